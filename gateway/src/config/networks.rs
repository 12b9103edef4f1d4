//! Sets of addresses: `127.0.0.1`, `10.0.0.0/8`, `2001:db8::/32`.

use std::{net::IpAddr, str::FromStr};

use ipnet::IpNet;

/// Addresses and networks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks(Vec<IpNet>);

/// Why a text is neither an address nor a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected an IP address, or a network such as 10.0.0.0/8 without bits beyond its prefix")]
pub struct InvalidNetwork;

impl Networks {
    /// Parses each text as one entry.
    pub fn parse<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidNetwork> {
        texts.into_iter().map(network).collect::<Result<_, _>>().map(Self)
    }

    /// Whether the set contains the address. An IPv4 address mapped into IPv6 (RFC 4291 §2.5.5.2) counts as
    /// IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address))
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn network(text: &str) -> Result<IpNet, InvalidNetwork> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.to_canonical().into());
    }
    // Bits beyond the prefix usually mean that the prefix is wrong.
    IpNet::from_str(text).ok().filter(|network| network.trunc() == *network).ok_or(InvalidNetwork)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_networks() {
        let networks =
            Networks::parse(["127.0.0.1", "10.0.0.0/8", "2001:db8::/32", "::ffff:192.0.2.1"]).unwrap();
        for inside in ["127.0.0.1", "::ffff:127.0.0.1", "10.255.0.1", "2001:db8:1::1", "192.0.2.1"] {
            assert!(networks.contains(inside.parse().unwrap()), "{inside}");
        }
        for outside in ["127.0.0.2", "11.0.0.1", "2001:db9::1", "::1", "::"] {
            assert!(!networks.contains(outside.parse().unwrap()), "{outside}");
        }
        for wrong in ["", "localhost", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.0/", "10.0.0"] {
            assert_eq!(Networks::parse([wrong]), Err(InvalidNetwork), "{wrong}");
        }
    }
}
