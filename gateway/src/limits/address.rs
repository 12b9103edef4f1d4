//! What counts as one address.

use std::net::IpAddr;

/// The owner of an address: an IPv4 address, or the /64 network of an IPv6 address. A customer gets at least
/// a /64 and can use any address in it.
///
/// IPv4 addresses mapped into IPv6 (RFC 4291 §2.5.5.2) count as IPv4. Both kinds share 64 bits without
/// collisions: the /64 networks under `::/32` are reserved (§4 there), except for that of `::1`, which has no
/// other address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressKey(u64);

impl From<IpAddr> for AddressKey {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(address.to_bits().into()),
            IpAddr::V6(address) => {
                let [high, _] = halves(address.to_bits());
                Self(high)
            }
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the halves of 128 bits")]
fn halves(bits: u128) -> [u64; 2] {
    [(bits >> 64) as u64, bits as u64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_by_64_and_ipv4_whole() {
        let key = |text: &str| AddressKey::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(key("192.0.2.1"), key("::ffff:192.0.2.1"));
        assert_ne!(key("192.0.2.1"), key("192.0.2.2"));
        assert_eq!(key("2001:db8:0:1::1"), key("2001:db8:0:1:ffff:ffff:ffff:ffff"));
        assert_ne!(key("2001:db8:0:1::1"), key("2001:db8:0:2::1"));
        assert_ne!(key("::1"), key("127.0.0.1"));
        assert_ne!(key("::1"), key("2001:db8::1"));
    }
}
