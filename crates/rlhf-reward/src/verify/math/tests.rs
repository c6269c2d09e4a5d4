use super::*;
use serde_json::json;

#[test]
fn equal_answers() {
    for (a, b) in [
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\dfrac12", r"\tfrac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        ("1 1/2", "3/2"),
        (r"1\frac{1}{2}", "1.5"),
        ("-1 1/2", "-1.5"),
        ("½", "0.5"),
        ("1,234,567", "1234567"),
        (r"1{,}234", "1234"),
        (r"1,\!234", "1234"),
        (r"10\,000", "10000"),
        ("$1,000", "1000"),
        (r"\$18", "18 dollars"),
        ("18 dollars", "$18.00"),
        ("-$5", "-5"),
        ("€5", "5 euros"),
        ("50%", "0.5"),
        (r"50\%", "50"),
        ("50 percent", "50%"),
        ("5 cm", "5"),
        (r"5\text{ cm}", "5 cm"),
        (r"12\text{ cm}^2", "12"),
        ("12 m^2", "12"),
        ("60 miles per hour", "60"),
        ("5 m", "5"),
        ("72 clips", "72"),
        ("5.", "5"),
        ("5.0", "5"),
        (".5", "0.5"),
        ("+7", "7"),
        ("−3", "-3"),
        ("--3", "3"),
        ("1e3", "1000"),
        (r"1.5 \times 10^{-3}", "0.0015"),
        (r"6.02\cdot 10^{23}", "6.02e23"),
        ("2^{10}", "1024"),
        ("2^10", "1024"),
        ("2^-1", "1/2"),
        (r"\sqrt{4}", "2"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"\sqrt[3]{27}", "3"),
        ("sqrt(2)/2", r"\frac{\sqrt{2}}{2}"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        ("√2", r"\sqrt2"),
        ("√12", r"2\sqrt{3}"),
        ("a = 1, b = 2", "1, 2"),
        ("(x, y) = (1, 2)", "(1,2)"),
        ("New  York", "new york"),
        (r"2\pi", "2π"),
        (r"\pi/2", r"\frac{\pi}{2}"),
        ("2*pi", r"2\pi"),
        (r"3\pi", "9.42477796076938"),
        ("0.333333333333", "1/3"),
        ("x=5", "5"),
        ("x = 5", "y=5"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90 degrees"),
        ("90°", "90"),
        ("(1, 2)", r"\left(1,2\right)"),
        ("(1/2, 3)", "(0.5,3.0)"),
        ("[0, 1)", "[0,1)"),
        (r"(-\infty, 3]", "(-∞,3]"),
        (r"(-\infty,0)\cup(1,2)", r"(-\infty, 0) \cup (1, 2)"),
        (r"\{1, 2, 3\}", r"\{3,2,1\}"),
        ("1, 2", "2,1"),
        ("1 and 2", "1, 2"),
        ("1, 2, and 3", "1,2,3"),
        (r"\pm 3", "3, -3"),
        (r"1 \pm \sqrt{2}", r"1-\sqrt{2}, 1+\sqrt{2}"),
        ("x+1", "1+x"),
        ("2x+3", "3 + 2x"),
        ("(x+1)^2", "x^2+2x+1"),
        ("2xy", "2yx"),
        (r"\frac{x}{2}", "x/2"),
        (r"3+4i", "4i+3"),
        ("e^2", "e^{2}"),
        (r"\text{Tuesday}", "tuesday"),
        ("(A)", "A"),
        ("A.", "A"),
        (r"\text{(B)}", "B"),
        ("$5$", "5"),
        (r"\boxed{5}", "5"),
        ("3:4", "3 : 4"),
        (
            "123456789012345678901234567890123456789012345",
            "123456789012345678901234567890123456789012345",
        ),
        ("yes", "Yes"),
    ] {
        assert!(equal(a, b), "{a} = {b}");
        assert!(equal(b, a), "{b} = {a}");
    }
}

#[test]
fn different_answers() {
    for (a, b) in [
        ("1", "2"),
        ("1", "-1"),
        ("1000000001", "1000000002"),
        (
            "123456789012345678901234567890123456789012345",
            "123456789012345678901234567890123456789012346",
        ),
        ("0.33", "1/3"),
        ("5 cm", "5 km"),
        ("5 cents", "5 dollars"),
        ("$5", "5 euros"),
        ("(1, 2)", "(2, 1)"),
        ("[0, 1)", "[0, 1]"),
        ("(0, 1)", "[0, 1]"),
        ("(1,2)", "(1,2,3)"),
        (r"\{1,2\}", r"\{1,2,2\}"),
        ("1, 2", "1"),
        ("1, 2", "1, 1"),
        ("x+1", "x+2"),
        ("x", "y"),
        ("2x", "2"),
        ("no", "on"),
        ("5", "5x"),
        (r"\pi", "3.14"),
        (r"\sqrt{2}", "1.414"),
        ("1/0", "2/0"),
        ("0", ""),
        ("", ""),
        ("A", "B"),
        ("5!", "5"),
        ("1 2", "12"),
        ("5 or 6", "5"),
        ("1e999999999", "1e888888888"),
        ("10^{999999999}", "10^{888888888}"),
        ("-7", "7"),
        ("50%", "5"),
    ] {
        assert!(!equal(a, b), "{a} ≠ {b}");
        assert!(!equal(b, a), "{b} ≠ {a}");
    }
}

#[test]
fn answers_are_found() {
    for (text, found) in [
        (r"so $\boxed{42}$.", "42"),
        (
            r"$\boxed{\frac{1}{2}}$ first, then \boxed{\text{a \} b}}",
            r"\text{a \} b}",
        ),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed 7 and", "7"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        ("<think>9</think><answer> 12 </answer>", "12"),
        ("It is 5+5=10.\n#### 10", "10"),
        ("#### 1,234\nmore", "1,234"),
        ("The answer is 12.", "12."),
        ("The answer is: **12**. Then 13", "12"),
        ("Answer: 3/4", "3/4"),
        ("final answer is $x = 5$", "$x = 5$"),
        ("First 3 and then 4 apples. In all 7 apples", "7"),
        ("A: -129,025", "-129,025"),
        ("from 3-5", "5"),
        ("costs $1,234.50 in all", "$1,234.50"),
        ("it grew by 25%", "25%"),
        ("half: 1/2", "1/2"),
        ("1,234 of 5,678", "5,678"),
    ] {
        let all = extract(text, &Extract::all());
        assert_eq!(all.first().map(String::as_str), Some(found), "{text}");
    }
    assert!(extract("nothing here", &Extract::all()).is_empty());
    assert!(extract(r"\boxed{", &Extract::all()).is_empty());
    assert!(extract("", &Extract::all()).is_empty());
    assert!(extract("v1.2 and B52", &Extract::all()).is_empty());
    assert!(extract("The answer is 5", &[Extract::Boxed]).is_empty());
}

fn verdict(completion: &str, answer: serde_json::Value) -> f64 {
    let fields = json!({"answer": answer});
    let sample = Sample::new("", completion, fields.as_object().unwrap());
    Math::default().verify(&sample).unwrap().score
}

#[test]
fn whole_verdicts() {
    for (completion, answer, score) in [
        (
            "The answer is 12 apples because of reasons.",
            json!("12"),
            1.0,
        ),
        ("The answer is therefore 12, not 13", json!(12), 1.0),
        ("The answer is 5 or 6", json!("5"), 0.0),
        ("So she has $90,000.\nA: 90000", json!("90000"), 1.0),
        (
            r"\boxed{0.5}",
            json!(r"We add. Thus $\boxed{\frac12}$."),
            1.0,
        ),
        ("#### 10", json!("5 + 5 = <<5+5=10>>10\n#### 10"), 1.0),
        (r"First \boxed{3}, no: \boxed{4}", json!("3"), 0.0),
        ("I do not know.", json!("3"), 0.0),
        (r"The answer is $\frac{3}{4}$", json!("0.75"), 1.0),
        ("The final answer is: x = 2 and x = 3.", json!("2, 3"), 1.0),
    ] {
        assert_eq!(
            verdict(completion, answer.clone()),
            score,
            "{completion} {answer}"
        );
    }
    let fields = json!({"answer": " "});
    let sample = Sample::new("", "1", fields.as_object().unwrap());
    assert!(Math::default().verify(&sample).is_err());
}

#[test]
fn hostile_text_is_bounded() {
    let many = 1 << 20;
    for text in [
        "{".repeat(many),
        "}".repeat(many),
        r"\boxed{".repeat(many / 7),
        format!(r"\boxed{{{}", "{".repeat(many)),
        format!(r"\boxed{{{}}}", "9".repeat(many)),
        "9".repeat(many),
        "1,".repeat(many / 2),
        "answer is ".repeat(many / 10),
        "####".repeat(many / 4),
        "(".repeat(many),
        "-".repeat(many),
        r"\frac".repeat(many / 5),
        "é".repeat(many / 2),
    ] {
        let found = extract(&text, &Extract::all());
        let _ = found.iter().any(|f| equal("1", f));
        let cut: String = text.chars().take(1000).collect();
        assert!(!equal(&cut, "1"));
        assert!(!equal("1", &format!("{cut}1e999999999")));
    }
    for text in [
        "1e999999999",
        "-1e-999999999",
        "0e99999999999999999999",
        r"\sqrt[99999999999]{2}",
        "9^9^9^9^9",
        "(-8)^{1/3}",
    ] {
        let _ = equal(text, "1");
    }
}
