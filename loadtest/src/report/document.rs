//! A report as a document: the terminal and the HTML page show the same tables.

use std::fmt;

use serde::Serialize;

/// A report.
#[derive(Clone, Debug, Default)]
pub struct Document {
    pub title: String,
    /// Lines below the title.
    pub facts: Vec<String>,
    pub tables: Vec<Table>,
    /// Shown on the HTML page only.
    pub charts: Vec<Chart>,
    pub warnings: Vec<String>,
    pub expectations: Vec<Expectation>,
}

/// Cells in rows. The first column is text, the others are numbers.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pub caption: String,
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// A plot.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    pub title: String,
    pub x: String,
    pub y: String,
    /// The marks of the horizontal axis with their labels; chosen automatically if empty.
    pub marks: Vec<(f64, String)>,
    pub series: Vec<Series>,
}

/// One line of a plot.
#[derive(Clone, Debug, Default)]
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// A condition that should hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Expectation {
    /// The flag that states it, and the result.
    pub words: String,
    pub met: bool,
}

impl Table {
    /// An empty table.
    pub fn new(caption: &str, head: &[&str]) -> Self {
        let head = head.iter().map(|&word| word.to_owned()).collect();
        Self { caption: caption.to_owned(), head, rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn width(&self, column: usize) -> usize {
        let cells = std::iter::once(&self.head).chain(&self.rows).filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    }
}

impl Chart {
    /// Whether there is anything to draw.
    pub fn is_empty(&self) -> bool {
        self.series.iter().all(|series| series.points.len() < 2)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.caption.is_empty() {
            writeln!(f, "{}", self.caption)?;
        }
        for row in std::iter::once(&self.head).chain(&self.rows) {
            for (column, cell) in row.iter().enumerate() {
                let width = self.width(column);
                match column {
                    0 => write!(f, "{cell:<width$}")?,
                    _ => write!(f, "  {cell:>width$}")?,
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.title)?;
        self.facts.iter().try_for_each(|fact| writeln!(f, "{fact}"))?;
        for table in self.tables.iter().filter(|table| !table.rows.is_empty()) {
            write!(f, "\n{table}")?;
        }
        if !self.warnings.is_empty() || !self.expectations.is_empty() {
            writeln!(f)?;
        }
        self.warnings.iter().try_for_each(|warning| writeln!(f, "warning: {warning}"))?;
        for Expectation { words, met } in &self.expectations {
            writeln!(f, "{}: {words}", if *met { "met" } else { "NOT MET" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_terminal_aligns_columns() {
        let mut table = Table::new("numbers", &["name", "µs"]);
        table.row(["a".into(), "1".into()]);
        table.row(["longer".into(), "1000".into()]);
        let document = Document {
            title: "test".into(),
            tables: vec![table, Table::new("empty", &["x"])],
            warnings: vec!["careful".into()],
            expectations: vec![Expectation { words: "--expect-lost 0: 3 are missing".into(), met: false }],
            ..Document::default()
        };
        let expected = "test\n\nnumbers\nname      µs\na          1\nlonger  1000\n\nwarning: careful\n\
                        NOT MET: --expect-lost 0: 3 are missing\n";
        assert_eq!(document.to_string(), expected);
    }
}
