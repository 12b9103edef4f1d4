//! A report as one self-contained page: tables, and plots as inline SVG.

use std::fmt::Write as _;

use super::{
    document::{Document, Table},
    svg::{draw, escape},
};

const STYLE: &str = "body{font:14px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;\
color:#222;background:#fff}h1{font-size:1.4rem}table{border-collapse:collapse;margin:.3rem 0 1.5rem;\
font-variant-numeric:tabular-nums}caption{text-align:left;font-weight:600}td,th{padding:.15rem .7rem;\
text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}td:first-child,th:first-child{text-align:left}\
.warning{color:#8a5300}.met{color:#006d4f}.missed{color:#b00020;font-weight:600}svg{width:100%;height:auto;\
margin:.5rem 0}div.wide{overflow-x:auto}footer{color:#666;font-size:.9em}";

/// The page of `document`.
pub fn page(document: &Document) -> String {
    let mut out = String::new();
    let title = escape(&document.title);
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n<p>"
    );
    out.push_str(&document.facts.iter().map(|fact| escape(fact)).collect::<Vec<_>>().join("<br>\n"));
    out.push_str("</p>\n<ul>\n");
    for expectation in &document.expectations {
        let (class, word) = if expectation.met { ("met", "met") } else { ("missed", "not met") };
        let _ = writeln!(out, "<li class=\"{class}\">{word}: {}</li>", escape(&expectation.words));
    }
    for warning in &document.warnings {
        let _ = writeln!(out, "<li class=\"warning\">warning: {}</li>", escape(warning));
    }
    out.push_str("</ul>\n");
    document.tables.iter().filter(|table| !table.rows.is_empty()).for_each(|part| table(&mut out, part));
    for chart in document.charts.iter().filter(|chart| !chart.is_empty()) {
        out.push_str(&draw(chart));
        out.push('\n');
    }
    out.push_str("<footer>tidegate-loadtest</footer></body></html>\n");
    out
}

fn table(out: &mut String, table: &Table) {
    let _ = write!(out, "<div class=\"wide\"><table><caption>{}</caption>\n<tr>", escape(&table.caption));
    let cells = |row: &[String], tag: &str| {
        let cells = row.iter().map(|cell| escape(cell));
        format!("<{tag}>{}</{tag}>", cells.collect::<Vec<_>>().join(&format!("</{tag}><{tag}>")))
    };
    out.push_str(&cells(&table.head, "th"));
    out.push_str("</tr>\n");
    for row in &table.rows {
        out.push_str("<tr>");
        out.push_str(&cells(row, "td"));
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::document::{Chart, Expectation, Series};

    #[test]
    fn a_page_is_self_contained() {
        let mut numbers = Table::new("<numbers>", &["x"]);
        numbers.row(["1 < 2".to_owned()]);
        let series = Series { name: "line".into(), points: vec![(0.0, 1.0), (1.0, 2.0)] };
        let document = Document {
            title: "a \"run\"".into(),
            facts: vec!["fact".into()],
            tables: vec![numbers],
            charts: vec![Chart { series: vec![series], ..Chart::default() }, Chart::default()],
            warnings: vec!["careful".into()],
            expectations: vec![Expectation { words: "--expect-lost 0".into(), met: false }],
        };
        let page = page(&document);
        assert_eq!(page.matches("<svg").count(), 1, "an empty plot is left out");
        for words in ["1 &lt; 2", "&lt;numbers&gt;", "not met: --expect-lost 0", "warning: careful"] {
            assert!(page.contains(words), "{words}: {page}");
        }
        let elsewhere = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!elsewhere.contains("http") && !elsewhere.contains("<script") && !elsewhere.contains("src="));
    }
}
