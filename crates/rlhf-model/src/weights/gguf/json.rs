//! JSON laid out as Python's `json` module does, so that a folder can be compared by its bytes.

use serde_json::Value;

/// JSON indented by one space, with numbers spelled as Python spells them: the format that tools of
/// this ecosystem write, so that a folder can be compared by its bytes.
pub(super) fn write_json(value: &Value, depth: usize, out: &mut String) {
    let line = |depth: usize, out: &mut String| {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', depth));
    };
    match value {
        Value::Array(items) if !items.is_empty() => {
            for (i, item) in items.iter().enumerate() {
                out.push(if i == 0 { '[' } else { ',' });
                line(depth + 1, out);
                write_json(item, depth + 1, out);
            }
            line(depth, out);
            out.push(']');
        }
        Value::Object(map) if !map.is_empty() => {
            for (i, (key, item)) in map.iter().enumerate() {
                out.push(if i == 0 { '{' } else { ',' });
                line(depth + 1, out);
                out.push_str(&Value::String(key.clone()).to_string());
                out.push_str(": ");
                write_json(item, depth + 1, out);
            }
            line(depth, out);
            out.push('}');
        }
        Value::Number(n) => match n.as_f64().filter(|_| n.is_f64()) {
            Some(x) => out.push_str(&python_float(x)),
            None => out.push_str(&n.to_string()),
        },
        other => out.push_str(&other.to_string()),
    }
}

/// The shortest decimal that reads back as `x`, as Python's `repr` lays it out.
fn python_float(x: f64) -> String {
    let scientific = format!("{x:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    match exponent.parse::<i32>() {
        Ok(e) if (-4..16).contains(&e) => format!("{x:?}"),
        Ok(e) => format!("{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs()),
        Err(_) => scientific,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn floats_are_spelled_as_python_does() {
        for (x, text) in [
            (0.0, "0.0"),
            (1e-5, "1e-05"),
            (0.0001, "0.0001"),
            (100_000.0, "100000.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (1.0 / 24.0, "0.041666666666666664"),
            (2.5e300, "2.5e+300"),
        ] {
            assert_eq!(python_float(x), text);
        }
    }

    #[test]
    fn json_is_laid_out_as_python_does() {
        let mut out = String::new();
        write_json(
            &json!({"a": [1, "é\n"], "b": {}, "c": [], "d": null}),
            0,
            &mut out,
        );
        assert_eq!(
            out,
            "{\n \"a\": [\n  1,\n  \"é\\n\"\n ],\n \"b\": {},\n \"c\": [],\n \"d\": null\n}"
        );
    }
}
