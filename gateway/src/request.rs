//! HTTP requests before they are answered or become sessions: who sends them, whether they are allowed, and
//! how they are refused.
//!
//! Knows no routes or protocols: the protocols' endpoints and the server's routes call it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`gate`] | [`Gate`]: the checks that all endpoints share |
//! | [`problem`] | [`Problem`]: a refusal as a response (RFC 9457) |
//! | [`cors`] | which pages may use the public listener |
//! | [`accept`] | which media type a request prefers |
//! | [`query`] | query parameters |
//! | [`forwarded`] | the client's address as proxies report it |
//! | [`refusals`] | log messages for refused tokens, origins and grants |
//! | [`metrics`] | request metrics |

pub mod accept;
pub mod cors;
pub mod forwarded;
pub mod gate;
pub mod metrics;
pub mod problem;
pub mod query;
pub mod refusals;

pub use self::{
    gate::{Applicant, Gate, verify},
    metrics::RequestMetrics,
    problem::Problem,
};
