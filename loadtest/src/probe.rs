//! One request to an HTTP server outside the test: its readiness or its metrics.
//!
//! Owns a connection until the answer is complete. Plain HTTP only; the traffic under test does not use it.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    str::FromStr,
    time::Duration,
};

use anyhow::{Context, bail, ensure};

use crate::web::{Basic, Web, authorization};

/// The time limit of an answer, and its maximum length.
const PATIENCE: Duration = Duration::from_secs(2);
const LONGEST: u64 = 4 * 1024 * 1024;

/// Where to send the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    socket: SocketAddr,
    authority: String,
    path: String,
    basic: Option<Basic>,
}

impl FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let web = Web::parse(text, &["http"]).map_err(|error| error.to_string())?;
        let socket = web.resolve().map_err(|error| format!("{error:#}"))?;
        Ok(Self { socket, authority: web.authority, path: web.path_and_query, basic: web.basic })
    }
}

impl Url {
    /// Sends a `GET` and returns the status and the body of the answer.
    pub fn get(&self) -> anyhow::Result<(u16, String)> {
        let mut socket = TcpStream::connect_timeout(&self.socket, PATIENCE)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let Self { authority, path, basic, .. } = self;
        let credentials = authorization(basic.as_ref(), None);
        write!(socket, "GET {path} HTTP/1.1\r\nHost: {authority}\r\n{credentials}Connection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        socket.take(LONGEST).read_to_end(&mut answer)?;
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(head) = response.parse(&answer)? else {
            bail!("the answer is incomplete")
        };
        let chunked =
            response.headers.iter().any(|header| header.name.eq_ignore_ascii_case("transfer-encoding"));
        ensure!(!chunked, "the answer is chunked, which is not supported");
        let body = answer.get(head..).unwrap_or_default();
        Ok((response.code.unwrap_or(0), String::from_utf8_lossy(body).into_owned()))
    }

    /// The value of `name` on a page of metrics in Prometheus text format: the sum over its series.
    pub fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let (status, page) = self.get()?;
        ensure!(status == 200, "{} answered with status {status}", self.authority);
        sum(&page, name).with_context(|| format!("{} has no metric {name}", self.authority))
    }
}

fn sum(page: &str, name: &str) -> Option<f64> {
    let of = |line: &str| {
        let rest = line.strip_prefix(name)?;
        if !rest.starts_with(['{', ' ']) {
            return None;
        }
        rest.rsplit_once(' ')?.1.parse::<f64>().ok()
    };
    page.lines().filter_map(of).reduce(|sum, value| sum + value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_their_series() {
        let page = "# HELP a words\n# TYPE a gauge\na{x=\"1\"} 2\na{x=\"b c\"} 3.5\na_total 7\nb 0\n";
        assert_eq!(sum(page, "a"), Some(5.5));
        assert_eq!((sum(page, "b"), sum(page, "c"), sum(page, "a_tot")), (Some(0.0), None, None));
    }

    #[test]
    fn only_plain_http_urls_are_accepted() {
        let url: Url = "http://127.0.0.1:9090/readyz".parse().unwrap();
        assert_eq!((url.socket.port(), url.path.as_str()), (9090, "/readyz"));
        for bad in ["https://127.0.0.1/", "127.0.0.1:9090", "http://", ""] {
            assert!(bad.parse::<Url>().is_err(), "{bad}");
        }
    }
}
