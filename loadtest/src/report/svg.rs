//! Plots as SVG, written by hand: no script, no font, no external file.

use std::fmt::Write as _;

use super::document::{Chart, Series};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 40.0;
const MARKS: f64 = 5.0;

/// Distinguishable with colour blindness.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

/// Draws `chart`.
pub fn draw(chart: &Chart) -> String {
    let points = || chart.series.iter().flat_map(|series| &series.points);
    let xs = Axis::over(points().map(|point| point.0), chart.marks.is_empty());
    let ys = Axis::over(points().map(|point| point.1).chain([0.0]), true);
    let x = |value: f64| LEFT + xs.part(value) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - ys.part(value) * (HEIGHT - TOP - BOTTOM);
    let mut out = String::new();
    let (low, high) = (HEIGHT - BOTTOM, TOP);
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         font-family=\"system-ui,sans-serif\" font-size=\"11\"><title>{title}</title>\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\
         <text x=\"{LEFT}\" y=\"16\" font-size=\"13\" font-weight=\"600\" fill=\"#222\">{title}</text>",
        title = escape(&chart.title),
    );
    for value in ys.marks() {
        let at = y(value);
        let _ = write!(
            out,
            "<path d=\"M{LEFT} {at:.1}H{:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            short(value),
        );
    }
    let marks = if chart.marks.is_empty() {
        xs.marks().into_iter().map(|value| (value, short(value))).collect()
    } else {
        chart.marks.clone()
    };
    for (value, words) in marks {
        let at = x(value);
        let _ = write!(
            out,
            "<path d=\"M{at:.1} {high:.1}V{low:.1}\" stroke=\"#eee\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{}</text>",
            low + 15.0,
            escape(&words),
        );
    }
    let _ = write!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555\">{}</text>\
         <text x=\"{LEFT}\" y=\"30\" fill=\"#555\">{}</text>",
        WIDTH - RIGHT,
        HEIGHT - 6.0,
        escape(&chart.x),
        escape(&chart.y),
    );
    let mut legend = WIDTH - RIGHT;
    for (number, Series { name, points }) in chart.series.iter().enumerate().rev() {
        let colour = COLOURS.get(number % COLOURS.len()).unwrap_or(&"#000");
        let path: Vec<String> = points.iter().map(|&(px, py)| format!("{:.1} {:.1}", x(px), y(py))).collect();
        if !path.is_empty() {
            let _ = write!(
                out,
                "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\" stroke-linejoin=\"round\"/>",
                path.join("L"),
            );
        }
        let _ = write!(
            out,
            "<text x=\"{legend:.1}\" y=\"16\" text-anchor=\"end\" fill=\"{colour}\" font-weight=\"600\">{}</text>",
            escape(name),
        );
        #[expect(clippy::cast_precision_loss, reason = "a name's length")]
        let width = name.chars().count() as f64 * 7.0 + 14.0;
        legend -= width;
    }
    out.push_str("</svg>");
    out
}

/// Draws a bar for every value, all from zero.
pub fn bars(title: &str, unit: &str, values: &[(&str, f64)]) -> String {
    const BAR: f64 = 26.0;
    const NAMES: f64 = 130.0;
    const NUMBERS: f64 = 70.0;
    let axis = Axis::over(values.iter().map(|value| value.1).chain([0.0]), true);
    #[expect(clippy::cast_precision_loss, reason = "a few bars")]
    let height = 40.0 + BAR * values.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         font-family=\"system-ui,sans-serif\" font-size=\"12\"><title>{title}</title>\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\
         <text x=\"8\" y=\"20\" font-size=\"13\" font-weight=\"600\" fill=\"#222\">{title}, {unit}</text>",
        title = escape(title),
        unit = escape(unit),
    );
    let mut top = 32.0;
    for (number, (name, value)) in values.iter().enumerate() {
        let colour = COLOURS.get(number % COLOURS.len()).unwrap_or(&"#000");
        let length = axis.part(*value) * (WIDTH - NAMES - NUMBERS);
        let _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#222\">{}</text>\
             <rect x=\"{NAMES}\" y=\"{top:.1}\" width=\"{length:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" fill=\"#222\">{}</text>",
            NAMES - 8.0,
            top + 14.0,
            escape(name),
            BAR - 6.0,
            NAMES + length + 6.0,
            top + 14.0,
            short(*value),
        );
        top += BAR;
    }
    out.push_str("</svg>");
    out
}

/// The range of an axis.
struct Axis {
    low: f64,
    high: f64,
    step: f64,
}

impl Axis {
    /// Covers all of `values`; with `round`, ends at marks.
    fn over(values: impl Iterator<Item = f64>, round: bool) -> Self {
        let finite = values.filter(|value| value.is_finite());
        let (low, high) = finite
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = if low < high { (low, high) } else { (low.min(0.0), low.max(0.0) + 1.0) };
        let (low, high) = if low.is_finite() && high.is_finite() { (low, high) } else { (0.0, 1.0) };
        let rough = (high - low) / MARKS;
        let scale = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|factor| factor * scale);
        let step = step.filter(|step| *step >= rough).fold(f64::INFINITY, f64::min);
        if round {
            Self { low: (low / step).floor() * step, high: (high / step).ceil() * step, step }
        } else {
            Self { low, high, step }
        }
    }

    fn part(&self, value: f64) -> f64 {
        ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }

    fn marks(&self) -> Vec<f64> {
        let mut marks = Vec::new();
        let mut value = self.low;
        while value <= self.high + self.step / 2.0 && marks.len() < 20 {
            marks.push(value);
            value += self.step;
        }
        marks
    }
}

/// A short form of a number.
pub fn short(value: f64) -> String {
    let (scaled, unit) = match value.abs() {
        size if size >= 1e9 => (value / 1e9, "G"),
        size if size >= 1e6 => (value / 1e6, "M"),
        size if size >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let digits = match scaled.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{scaled:.digits$}");
    let text = if digits > 0 { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{unit}")
}

/// Escapes text for markup.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_contains_its_points_and_escapes_markup() {
        let series = Series { name: "<p99>".into(), points: vec![(0.0, 0.0), (10.0, 350.0)] };
        let chart = Chart { title: "a & b".into(), series: vec![series], ..Chart::default() };
        let drawn = draw(&chart);
        assert!(drawn.contains("a &amp; b") && drawn.contains("&lt;p99&gt;"), "{drawn}");
        assert!(drawn.contains("M64.0 220.0L704.0 59.0"), "{drawn}");
        assert!(drawn.contains(">400</text>"), "the axis ends on a mark: {drawn}");
        assert!(draw(&Chart::default()).ends_with("</svg>"), "an empty chart can be drawn too");
        let flat = Series { name: String::new(), points: vec![(1.0, 5.0), (1.0, 5.0)] };
        assert!(!draw(&Chart { series: vec![flat], ..Chart::default() }).contains("NaN"));
    }

    #[test]
    fn numbers_are_short() {
        let written = [0.0, 0.25, 12.34, 250.4, 9_999.0, 12_500.0, 3.2e6, 2e9].map(short);
        assert_eq!(written, ["0", "0.25", "12.3", "250", "9999", "12.5k", "3.2M", "2G"]);
    }
}
