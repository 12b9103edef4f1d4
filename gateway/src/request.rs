//! HTTP requests, before they are answered or become sessions: who asks, whether they may, and how they are refused.
//!
//! Knows no route and no protocol: protocols' endpoints and the server's routes call it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`gate`] | [`Gate`]: the checks that all endpoints share |
//! | [`problem`] | [`Problem`]: an answer that refuses (RFC 9457) |
//! | [`cors`] | which pages may talk to the public listener |
//! | [`accept`] | which media type a request prefers |
//! | [`query`] | query parameters |
//! | [`forwarded`] | the client's address as proxies report it |
//! | [`refusals`] | refused tokens, origins and grants, in the log |
//! | [`metrics`] | what is counted of requests |

pub mod accept;
pub mod cors;
pub mod forwarded;
pub mod gate;
pub mod metrics;
pub mod problem;
pub mod query;
pub mod refusals;

pub use self::{
    gate::{Applicant, Gate},
    metrics::RequestMetrics,
    problem::Problem,
};
