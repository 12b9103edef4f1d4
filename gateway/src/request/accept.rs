//! Which media type a request prefers (RFC 9110 §12.5.1).

use http::{HeaderMap, header};

/// The entry of `offered` that the request prefers: the one with the greatest weight, and among equals the
/// first. Without `Accept`, everything is acceptable. `None` if nothing offered is.
pub fn preferred<'a>(headers: &HeaderMap, offered: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let mut best: Option<(u16, &str)> = None;
    for media_type in offered {
        let weight = weight(headers, media_type);
        if weight > best.map_or(0, |(weight, _)| weight) {
            best = Some((weight, media_type));
        }
    }
    best.map(|(_, media_type)| media_type)
}

/// Whether the request names this media type explicitly, and accepts no other with a greater weight.
pub fn asks_for(headers: &HeaderMap, media_type: &str) -> bool {
    let named = ranges(headers).filter(|(range, _)| range.eq_ignore_ascii_case(media_type));
    let weight = named.map(|(_, weight)| weight).max().unwrap_or_default();
    weight > 0 && ranges(headers).all(|(_, other)| other <= weight)
}

/// The weight of a media type, in thousandths: that of the most specific range that matches it.
fn weight(headers: &HeaderMap, media_type: &str) -> u16 {
    if !headers.contains_key(header::ACCEPT) {
        return 1000;
    }
    let kind = media_type.split('/').next().unwrap_or_default();
    let precision = |range: &str| {
        if range.eq_ignore_ascii_case(media_type) {
            Some(3)
        } else if range.strip_suffix("/*").is_some_and(|range| range.eq_ignore_ascii_case(kind)) {
            Some(2)
        } else {
            (range == "*/*").then_some(1)
        }
    };
    let covering = ranges(headers).filter_map(|(range, weight)| Some((precision(range)?, weight)));
    covering.max().map_or(0, |(_, weight)| weight)
}

/// The ranges of `Accept` with their weights, in thousandths. A malformed weight counts as 1.
fn ranges(headers: &HeaderMap) -> impl Iterator<Item = (&str, u16)> {
    let lists = headers.get_all(header::ACCEPT).iter().filter_map(|list| list.to_str().ok());
    lists.flat_map(|list| list.split(',')).map(|range| {
        let mut parts = range.split(';').map(str::trim);
        let range = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=").or(part.strip_prefix("Q=")));
        (range, weight.and_then(thousandths).unwrap_or(1000))
    })
}

/// Parses a weight (RFC 9110 §12.4.2): from 0 to 1, with three decimals at most.
fn thousandths(weight: &str) -> Option<u16> {
    let (whole, decimals) = weight.split_once('.').unwrap_or((weight, ""));
    if decimals.len() > 3 || !decimals.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let decimals = format!("{decimals:0<3}").parse::<u16>().ok()?;
    let weight = whole.parse::<u16>().ok()?.checked_mul(1000)?.checked_add(decimals)?;
    (weight <= 1000).then_some(weight)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const EVENTS: &str = "text/event-stream";
    const LINES: &str = "application/x-ndjson";

    fn headers(lists: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for list in lists {
            headers.append(header::ACCEPT, HeaderValue::from_str(list).unwrap());
        }
        headers
    }

    #[test]
    fn the_greatest_weight_and_then_the_first_is_preferred() {
        for (lists, expected) in [
            (&[] as &[&str], Some(EVENTS)),
            (&["*/*"], Some(EVENTS)),
            (&["text/event-stream"], Some(EVENTS)),
            (&["application/x-ndjson"], Some(LINES)),
            (&["application/*"], Some(LINES)),
            (&["text/html, TEXT/Event-Stream;q=0.5"], Some(EVENTS)),
            (&["text/event-stream;q=0.5, application/x-ndjson"], Some(LINES)),
            (&["text/event-stream;q=0.5", "application/x-ndjson;q=0.501"], Some(LINES)),
            (&["*/*, text/event-stream;q=0"], Some(LINES)),
            (&["*/*;q=0.1, application/x-ndjson;q=0.2"], Some(LINES)),
            (&["text/event-stream;q=0"], None),
            (&["application/json"], None),
            (&["text/html"], None),
            (&[""], None),
        ] {
            assert_eq!(preferred(&headers(lists), [EVENTS, LINES]), expected, "{lists:?}");
        }
    }

    #[test]
    fn weights() {
        for (text, weight) in [
            ("1", Some(1000)),
            ("1.000", Some(1000)),
            ("0", Some(0)),
            ("0.", Some(0)),
            ("0.5", Some(500)),
            ("0.05", Some(50)),
            ("0.999", Some(999)),
            ("0.9999", None),
            ("1.001", None),
            ("2", None),
            ("-1", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(thousandths(text), weight, "{text:?}");
        }
    }

    #[test]
    fn a_media_type_is_requested_by_name_and_before_others() {
        for (list, expected) in [
            ("text/event-stream", true),
            ("text/html, text/event-stream", true),
            ("text/html;q=0.1, text/event-stream;q=0.2", true),
            ("application/x-ndjson, text/event-stream;q=0.5", false),
            ("text/event-stream;q=0", false),
            ("*/*", false),
            ("text/*", false),
            ("text/event", false),
            ("", false),
        ] {
            assert_eq!(asks_for(&headers(&[list]), EVENTS), expected, "{list}");
        }
    }
}
