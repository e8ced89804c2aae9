//! Drawings for a page: SVG in the page's colours, in either colour scheme.

use std::fmt::Write as _;

/// Escapes text for contents and attributes of HTML and SVG.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // HTML and SVG cannot represent these.
            control if control.is_control() && !control.is_whitespace() => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

/// A drawing of `width` by `height` units; the page scales it to the page's width.
pub(super) struct Svg(String);

impl Svg {
    /// `what` is the description for screen readers.
    pub(super) fn new(width: f64, height: f64, what: &str) -> Svg {
        Svg(format!(
            "<svg viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\" aria-label=\"{}\">\n",
            escape(what)
        ))
    }

    pub(super) fn line(&mut self, [x1, y1, x2, y2]: [f64; 4], class: &str) {
        let _ = writeln!(
            self.0,
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" class=\"{class}\"/>"
        );
    }

    /// A rectangle; `title` is its tooltip.
    pub(super) fn rectangle(&mut self, [x, y, width, height]: [f64; 4], class: &str, title: &str) {
        let title = match title {
            "" => String::new(),
            title => format!("<title>{}</title>", escape(title)),
        };
        let _ = writeln!(
            self.0,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" \
             class=\"{class}\">{title}</rect>"
        );
    }

    /// `d` in SVG's language of paths.
    pub(super) fn path(&mut self, d: &str, class: &str) {
        let _ = writeln!(self.0, "<path d=\"{d}\" class=\"{class}\"/>");
    }

    /// `class` may have `e` for text that ends at `x`, and `m` for text centred at `x`.
    pub(super) fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{}</text>",
            escape(text)
        );
    }

    pub(super) fn finished(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

/// A scale from values to units of the drawing.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
}

impl Scale {
    /// Maps values `from..=to` to `start..=end`. An only value maps to the start.
    pub(super) fn new([from, to]: [f64; 2], [start, end]: [f64; 2]) -> Scale {
        Scale { from, to, start, end }
    }

    pub(super) fn at(self, value: f64) -> f64 {
        let whole = self.to - self.from;
        let share = if whole > 0.0 { (value - self.from) / whole } else { 0.0 };
        self.start + share.clamp(0.0, 1.0) * (self.end - self.start)
    }
}

/// Round numbers from 0 to the first at or beyond `most`, about `count` of them.
pub(super) fn ticks(most: f64, count: u32) -> Vec<f64> {
    if !(most.is_finite() && most > 0.0) {
        return vec![0.0, 1.0];
    }
    let rough = most / f64::from(count.max(1));
    let magnitude = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().find(|&step| step * magnitude >= rough);
    let step = step.unwrap_or(10.0) * magnitude;
    let steps = (most / step - 1e-9).ceil().max(1.0) as u32;
    (0..=steps).map(|index| f64::from(index) * step).collect()
}

/// A tick's number, without insignificant digits.
pub(super) fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_a_text_is_escaped() {
        let hostile = "<script>alert(\"1\")</script> & 'x' \u{0}\u{1b}";
        let escaped = escape(hostile);
        assert!(!escaped.contains(['<', '>', '"', '\'', '\u{0}', '\u{1b}']), "{escaped}");
        assert!(escaped.contains("&lt;script&gt;") && escaped.contains("&amp; "));
        let mut svg = Svg::new(10.0, 10.0, hostile);
        svg.text(0.0, 0.0, "t", hostile);
        svg.rectangle([0.0; 4], "t", hostile);
        assert!(!svg.finished().contains("<script"));
    }

    #[test]
    fn ticks_are_round_and_reach_the_end() {
        assert_eq!(ticks(9.5, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(1.0, 4), [0.0, 0.5, 1.0]);
        for most in [1e-6, 0.37, 3.0, 99.0, 12_345.0, 1e12] {
            let ticks = ticks(most, 5);
            assert!(*ticks.last().unwrap() >= most && (2..=11).contains(&ticks.len()), "{ticks:?}");
        }
        assert_eq!(ticks(0.0, 5).len(), 2);
        assert_eq!(ticks(f64::NAN, 5).len(), 2);
        assert_eq!([number(0.5), number(10.0), number(0.0)], ["0.5", "10", "0"]);
    }
}
