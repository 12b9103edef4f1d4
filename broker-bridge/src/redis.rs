//! Redis pub/sub between any number of nodes.

mod envelope;
mod resp;
mod url;

pub use url::{Endpoint, RedisUrl, Secret};
