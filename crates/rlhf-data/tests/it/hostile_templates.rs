//! Templates that would end the stack, the memory or the day: each is refused or stops.

use rlhf_data::chat_template::ChatTemplate;
use rlhf_data::conversation::{Message, Role};

fn render(source: &str) -> Result<String, String> {
    let special = vec!["</s>".to_owned()];
    let t = ChatTemplate::new(source, "test", "<s>", "</s>", special, (2024, 7, 9));
    let talk = [
        Message::new(Role::User, "hi"),
        Message::new(Role::Assistant, "yo"),
    ];
    t.and_then(|t| t.render(&talk, false))
        .map(|r| r.text)
        .map_err(|e| e.to_string())
}

#[test]
fn signs_that_overlap_are_no_tags() {
    for source in [
        "{%}", "{%-%}", "{%-}", "{%+%}", "{#}", "{{}", "{{}}", "{", "{%", "{{", "{#",
    ] {
        let _ = render(source);
    }
    assert!(render("{%}").is_err());
}

#[test]
fn long_tags_are_refused_before_they_are_compiled() {
    let n = 100_000;
    let long = |open: &str, one: &str, close: &str| format!("{open}{}{close}", one.repeat(n));
    for source in [
        long("{{ a", ".b", " }}"),
        long("{{ 'a'", "~'a'", " }}"),
        long("{{ 'a'", "|upper", " }}"),
        long("{{ ", "not ", "1 }}"),
        long("{{ ", "-", "1 }}"),
        long("{{ ", "1 if 1 else ", "1 }}"),
        long("{{ 1", " and 1", " }}"),
        long("{{ a", "[0]", " }}"),
        long("{{ a", " is defined", " }}"),
        long("{{ ", "(", ""),
        long("{{ '}}' ~ {'a': {}}", " ~ '%}'", " }}"),
        long("{% if 0 %}", "{% elif 0 %}", "{% endif %}"),
        long("{% raw %}{{ ' {% endraw %}{{ a", ".b", " }}"),
        long("{# {{ ' #}{{ a", ".b", " }}"),
        long("", "{% if 1 %}", ""),
        "x".repeat(2 << 20),
    ] {
        assert!(render(&source).is_err(), "{}", &source[..60]);
    }
    // As long as tags in the wild, and longer.
    assert_eq!(
        render(&format!("{{{{ ''{} }}}}", " ~ 'a'".repeat(300)))
            .unwrap()
            .len(),
        300
    );
    let e = render(&format!("\n{{{{ 1{} }}}}", " + 1".repeat(600))).unwrap_err();
    assert!(e.contains("line 2") && e.contains("1000"), "{e}");
}

#[test]
fn values_do_not_nest_without_end() {
    let again = |set: &str, show: &str| {
        format!(
            "{{% set ns = namespace(a=[], b=[]) %}}{{% for i in range(90000) %}}{set}{{% endfor %}}{{{{ {show} }}}}"
        )
    };
    for (set, show) in [
        ("{% set ns.a = [ns.a] %}", "ns.a | length"),
        ("{% set ns.a = [ns.a] %}", "ns.a | tojson"),
        ("{% set ns.a = {'a': ns.a} %}", "ns.a"),
        ("{%- set ns.a=(ns.a,) -%}", "ns.a"),
        ("{% set x = [ns.a] %}{% set ns.a = x %}", "ns.a"),
        ("{% set ns.a, ns.b = [ns.b], [ns.a] %}", "ns.a"),
        ("{% set ns.a = ns.a * 1 %}", "ns.a | length"),
        ("{% set ns.a = ns.a[0:] + [i] %}", "ns.a | length"),
        ("{% set ns.a = [ns.a, ns.a] %}", "ns.a | length"),
        ("{% set ns.a = ns %}", "ns"),
        ("{% set ns.a = [ns] %}", "ns | tojson"),
        ("{% set ns.a = namespace(b=ns.a) %}", "ns.a.b"),
        ("{% set ns.a = dict(b=ns) %}", "ns.a"),
        (
            "{% raw %}{% set ' {% endraw %}{% set ns.a = [ns.a] %}",
            "ns.a",
        ),
        ("{# {% set ' #}{% set ns.a = [ns.a] %}", "ns.a"),
        (
            "{{ {'a': {'b': 1}} and '{%' }}{% set ns.a = [ns.a] %}",
            "ns.a",
        ),
    ] {
        let source = again(set, show);
        // Cheap ones may end well; none may end the process, or take all day.
        if let Ok(text) = render(&source) {
            assert!(set.contains("* 1"), "{set}: {text}");
        }
    }
}

#[test]
fn templates_do_not_call_themselves_without_end() {
    for source in [
        "{% include 'chat' %}",
        "{% import 'chat' as c %}{{ c }}",
        "{% extends 'chat' %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{% call g() %}{{ f(n) }}{% endcall %}{% endmacro %}{% macro g() %}{{ caller() }}{% endmacro %}{{ f(1) }}",
        "{% for x in [[]] recursive %}{{ loop([x]) }}{% endfor %}",
        "{% macro f(x) %}{{ f([x]) }}{% endmacro %}{{ f([]) }}",
        "{% macro f(x) %}{{ f(x | map('list')) }}{% endmacro %}{{ f(messages) }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
    ] {
        assert!(render(source).is_err(), "{source}");
    }
}

#[test]
fn a_panic_of_the_engine_is_an_error() {
    let e = render("{{ '%(\n\u{383}(noen' | format(3) }}").unwrap_err();
    assert!(e.contains("do: correct the template"), "{e}");
}

#[test]
fn widths_and_indents_are_bounded() {
    for source in [
        "{{ '{:2000000000d}'.format(1) }}",
        "{{ '{:>2000000000}'.format('a') }}",
        "{{ '%2000000000d' | format(1) }}",
        "{{ 'a' | indent(2000000000) }}",
        "{{ [1] | tojson(indent=20000000000) }}",
        "{{ [[1]] | tojson(indent=18446744073709551615) }}",
        "{{ (['x'] * 1000000) | tojson(separators=['y' * 100000, '']) | length }}",
    ] {
        assert!(render(source).is_err(), "{source}");
    }
    assert_eq!(render("{{ '{:>4}'.format('a') }}").unwrap(), "   a");
}

#[test]
fn what_templates_keep_is_what_they_set() {
    let source = "{%- set ns = namespace(n=0, seen=[], last=none) -%}
{%- for m in messages -%}
  {%- set ns.n = ns.n + 1 -%}
  {%- set ns.seen = ns.seen + [{'role': m.role, 'n': ns.n}] -%}
  {%- set ns.last = m.content if m.role == 'user' else ns.last -%}
{%- endfor -%}
{%- set a, b = 'x', ['y', '%}'] -%}
{%- set rest = messages[1:] | selectattr('role', 'equalto', 'assistant') -%}
{%- set text | upper %}block {% endset -%}
{%- set wide | indent(width=2) %}a
b{% endset -%}
{%- macro say(what) -%}{% set said = what ~ '!' %}{{ said }}{%- endmacro -%}
{%- set f = say -%}
{{ ns.n }} {{ ns.seen | tojson }} {{ ns.last }} {{ a }}{{ b[1] }} {{ rest | list | length }} {{ text }}{{ f('ho') }} {{ nothing is defined }} {{ wide }}";
    assert_eq!(
        render(source).unwrap(),
        "2 [{\"role\": \"user\", \"n\": 1}, {\"role\": \"assistant\", \"n\": 2}] hi x%} 1 BLOCK ho! False a\n  b"
    );
    for (set, show, want) in [
        ("x = nothing", "[x is defined, x is none]", "[False, False]"),
        ("x = none", "[x is defined, x is none]", "[True, True]"),
        ("x = 1 if false", "x is defined", "False"),
        (
            "x = messages[0].tool_calls",
            "[x is defined, not x]",
            "[False, True]",
        ),
        ("x = 'a=b' ~ \"%}\"", "x", "a=b%}"),
        (
            "x=messages|map(attribute='role')",
            "[x|first, x|length]",
            "['user', 2]",
        ),
        ("x = {'a': {'b': 1}}", "x.a.b", "1"),
        ("x = range(3)", "x|list", "[0, 1, 2]"),
        ("x, y = messages", "y.role", "assistant"),
        ("x = messages[0]", "x['content'] ~ x.role", "hiuser"),
        ("x = 'é'", "x", "é"),
        ("x = 1 == 1", "x", "True"),
    ] {
        let source = format!("{{% set {set} %}}{{{{ {show} }}}}");
        assert_eq!(render(&source).unwrap(), want, "{set}");
    }
    // Lines of errors are those of the template as it was written.
    let e = render("{% set a =\n 1\n%}\n{{ raise_exception('here') }}").unwrap_err();
    assert!(e.contains("test, line 4"), "{e}");
    assert!(render("{% set a = %}").is_err());
}
