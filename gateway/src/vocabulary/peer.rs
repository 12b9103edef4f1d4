//! Where a request comes from.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use broker_bridge::SessionId;

use super::limit::AddressLimit;

/// Whom a request comes from, as far as they can be trusted who say so: the other end of the socket, or
/// whom a trusted proxy names.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Its address.
    pub address: IpAddr,
    /// Its port, unless the proxy does not say it.
    pub port: Option<u16>,
}

impl From<SocketAddr> for Peer {
    fn from(address: SocketAddr) -> Self {
        Self { address: address.ip(), port: Some(address.port()) }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => SocketAddr::new(self.address, port).fmt(f),
            None => self.address.fmt(f),
        }
    }
}

/// What is known of whoever has connected.
#[derive(Clone, Copy, Debug)]
pub enum PeerStatus {
    /// A client that has been counted.
    Known,
    /// A trusted proxy, which says in each request whom it comes from.
    Proxy,
    /// A client that is to be told why not.
    Refused(AddressLimit),
}

/// Names a request in the log; in the request's extensions.
#[derive(Clone, Copy, Debug)]
pub struct RequestName(pub SessionId);
