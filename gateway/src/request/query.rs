//! The query of a public request (`application/x-www-form-urlencoded`, WHATWG URL §5).

use std::borrow::Cow;

use super::Problem;
use crate::vocabulary::Refusal;

/// A query, parsed on demand.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a>(&'a str);

impl<'a> Query<'a> {
    /// The part after the `?`, if any.
    pub fn new(query: Option<&'a str>) -> Self {
        Self(query.unwrap_or_default())
    }

    /// All values of a parameter, decoded, in order.
    pub fn all(self, name: &str) -> impl Iterator<Item = Cow<'a, str>> {
        form_urlencoded::parse(self.0.as_bytes()).filter(move |(key, _)| key == name).map(|(_, value)| value)
    }

    /// The value of a parameter that may be given only once.
    pub fn one(self, name: &str) -> Result<Option<Cow<'a, str>>, Problem> {
        let mut values = self.all(name);
        let first = values.next();
        if values.next().is_some() {
            let detail = format!("query parameter `{name}`: expected once, found several times");
            return Err(Problem::new(Refusal::BadRequest, detail));
        }
        Ok(first)
    }

    /// The value of a parameter with a few possible values. The first is the default.
    pub fn choice<const N: usize>(
        self,
        name: &str,
        choices: [&'static str; N],
    ) -> Result<&'static str, Problem> {
        let [default, ..] = choices.as_slice() else { return Ok("") };
        let Some(value) = self.one(name)? else { return Ok(default) };
        choices.into_iter().find(|choice| *choice == value).ok_or_else(|| {
            let detail =
                format!("query parameter `{name}`: expected {}, found {value:?}", choices.join(" or "));
            Problem::new(Refusal::BadRequest, detail)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_decoded_and_checked() {
        let query = Query::new(Some("room=a%20b&room=c+d&echo=false&gap=never"));
        assert_eq!(query.all("room").collect::<Vec<_>>(), ["a b", "c d"]);
        assert_eq!(query.choice("echo", ["true", "false"]).unwrap(), "false");
        assert_eq!(query.choice("absent", ["true", "false"]).unwrap(), "true");
        assert_eq!(query.choice("gap", ["ignore", "close"]).unwrap_err().refusal(), Refusal::BadRequest);
        assert_eq!(query.one("room").unwrap_err().refusal(), Refusal::BadRequest);
    }
}
