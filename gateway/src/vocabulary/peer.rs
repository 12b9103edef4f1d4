//! The origin of a request.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use broker_bridge::SessionId;

use super::limit::AddressLimit;

/// The client's address: the socket's peer, or the one that a trusted proxy reports.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Its address.
    pub address: IpAddr,
    /// Its port, unless the proxy does not report it.
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

/// What is known about the peer of a connection.
#[derive(Clone, Copy, Debug)]
pub enum PeerStatus {
    /// A client whose connection has been counted.
    Known,
    /// A trusted proxy, which reports the client's address in each request.
    Proxy,
    /// A client to be refused with a response.
    Refused(AddressLimit),
}

/// The id of a request in the log; stored in the request's extensions.
#[derive(Clone, Copy, Debug)]
pub struct RequestName(pub SessionId);
