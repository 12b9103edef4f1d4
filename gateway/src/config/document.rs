//! Documents generated from the table of keys.

use std::fmt::Write;

use super::table::{Fallback, ROOMS_GRANT, Reload, Row, TABLE, is_of_rooms};

/// A configuration file with the default of every key, and explanations.
pub fn default_config() -> String {
    let mut text = String::from(
        "# The configuration of a Tidegate node: every key with its default.\n\
         # Keys without a default are commented out.\n\
         #\n\
         # The environment overrides this file (public.listen is TIDEGATE_PUBLIC__LISTEN), and flags override\n\
         # both (--set public.listen=0.0.0.0:8080).\n",
    );
    let mut section = "";
    for row in TABLE {
        let (table, key) = row.name().rsplit_once('.').unwrap_or(("", row.name()));
        text.push('\n');
        if table != section {
            section = table;
            let comment = match is_pattern(*row) {
                true if row.name() == ROOMS_GRANT.name => {
                    "# One table for each pattern. A room gets the grants of every pattern that matches. For the other\n# keys, the most precise pattern counts:\n# "
                }
                true => "# ",
                false => "",
            };
            let _ = writeln!(text, "{comment}[{}]", table.replace("<pattern>", "chat:*"));
        }
        for line in wrap(&format!("{} {}", row.doc(), row.more()), 100) {
            let _ = writeln!(text, "# {line}");
        }
        let restart =
            if row.reload() == Reload::Restart { " A change takes effect after a restart." } else { "" };
        for line in wrap(&format!("Value: {}.{restart}", row.describe()), 100) {
            let _ = writeln!(text, "# {line}");
        }
        let _ = match row.default() {
            _ if row.name() == ROOMS_GRANT.name => writeln!(text, r#"# {key} = ["subscribe", "publish"]"#),
            Fallback::Is(default) if is_pattern(*row) => writeln!(text, "# {key} = {default}"),
            Fallback::Is(default) => writeln!(text, "{key} = {default}"),
            Fallback::Unset { example } => writeln!(text, "# {key} = {example}"),
        };
    }
    text
}

/// The reference table of `docs/configuration.md`, in Markdown.
pub fn reference() -> String {
    let mut text = String::from(
        "| key | value | default | a change takes effect | what it does |\n|---|---|---|---|---|\n",
    );
    for row in TABLE {
        let default = match row.default() {
            Fallback::Is(default) => format!("`{default}`"),
            Fallback::Unset { .. } => "not set".to_owned(),
        };
        let reload = match row.reload() {
            Reload::Live => "at once",
            Reload::Restart => "after a restart",
        };
        let what = format!("{} {}", row.doc(), row.more());
        let (name, value) = (row.name(), row.describe());
        let _ = writeln!(text, "| `{name}` | {value} | {default} | {reload} | {} |", what.trim_end());
    }
    text
}

fn is_pattern(row: &dyn Row) -> bool {
    is_of_rooms(row.name())
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
