//! A page for a browser: one file without scripts and external resources, light or dark as the reader's system.

use std::fmt::Write as _;

pub use super::svg::escape;

/// A page that grows section by section.
pub struct Page {
    title: String,
    body: String,
}

impl Page {
    /// A page with this title, and a line below it.
    pub fn new(title: &str, line: &str) -> Page {
        let body = format!("<header><h1>{}</h1><p>{}</p></header>\n", escape(title), escape(line));
        Page { title: title.to_owned(), body }
    }

    /// The most important figures: names and values.
    pub fn highlights(&mut self, highlights: &[(&str, String)]) {
        self.body.push_str("<dl class=\"tiles\">");
        for (name, value) in highlights {
            let (name, value) = (escape(name), escape(value));
            let _ = write!(self.body, "<div><dt>{name}</dt><dd>{value}</dd></div>");
        }
        self.body.push_str("</dl>\n");
    }

    /// A paragraph.
    pub fn text(&mut self, text: &str) {
        let _ = writeln!(self.body, "<p class=\"note\">{}</p>", escape(text));
    }

    /// A drawing in SVG, inserted unchanged. `id` names it in the page.
    pub fn figure(&mut self, id: &str, title: &str, caption: &str, svg: &str) {
        let (id, title) = (escape(id), escape(title));
        let _ = writeln!(
            self.body,
            "<figure id=\"{id}\" class=\"{id}\"><h2>{title}</h2>\n{svg}<figcaption>{}</figcaption></figure>",
            escape(caption)
        );
    }

    /// A drawing with its own colours, on a white ground.
    pub fn plot(&mut self, id: &str, svg: &str) {
        let _ = writeln!(self.body, "<figure id=\"{}\" class=\"white\">{svg}</figure>", escape(id));
    }

    /// Rows of cells below a row of heads; the first column is flush left, the others right.
    pub fn table(&mut self, title: &str, head: &[String], rows: &[Vec<String>]) {
        let cells = |tag: &str, cells: &[String]| -> String {
            cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect()
        };
        let _ = write!(self.body, "<section><h2>{}</h2><div class=\"wide\"><table>", escape(title));
        let _ = write!(self.body, "<thead><tr>{}</tr></thead><tbody>", cells("th", head));
        for row in rows {
            let _ = writeln!(self.body, "<tr>{}</tr>", cells("td", row));
        }
        self.body.push_str("</tbody></table></div></section>\n");
    }

    /// The finished file.
    pub fn to_html(&self) -> String {
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n\
             <meta http-equiv=\"Content-Security-Policy\" \
             content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n\
             <link rel=\"icon\" href=\"data:,\">\n\
             <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{}</main>\n\
             </body>\n</html>\n",
            escape(&self.title),
            self.body
        )
    }
}

const STYLE: &str = include_str!("page.css");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_escapes_texts_and_has_no_external_resource() {
        const HOSTILE: &str = "<img src=\"http://x\" onerror='1'>";
        let mut page = Page::new(HOSTILE, HOSTILE);
        page.highlights(&[(HOSTILE, HOSTILE.into())]);
        page.text(HOSTILE);
        page.figure("id", HOSTILE, HOSTILE, "<svg></svg>");
        page.table(HOSTILE, &[HOSTILE.into()], &[vec![HOSTILE.into()]]);
        let html = page.to_html();
        assert!(!html.contains("<img") && !html.contains("<script"), "{html}");
        assert!(!html.contains("href=\"http") && !html.contains("url("), "{html}");
        assert!(html.contains("prefers-color-scheme: dark"));
    }
}
