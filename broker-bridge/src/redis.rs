//! Redis pub/sub between any number of nodes.

mod url;

pub use url::{Endpoint, RedisUrl, Secret};
