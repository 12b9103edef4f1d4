//! The modes in which TCP on loopback acknowledges messages, which depend on their size.
//!
//! A connection that has received little assumes segments of 536 bytes, and acknowledges at once when more
//! than one such segment is unacknowledged; otherwise it waits for the reader, or for a timer. On loopback an
//! acknowledgement sent at once is processed on the sender's time, a later one on the receiver's. So a
//! delivery costs the server more in one mode than in the other, whatever the program, and comparisons of two
//! sides in different modes compare the kernel. `README.md` has the command that shows the modes.

/// Sizes on the wire, in bytes, from which on a mode applies, ascending. Measured; the last lies between 800
/// and 900.
const MODES: [(f64, Mode); 4] =
    [(0.0, Mode::Cheap), (269.0, Mode::Dear), (537.0, Mode::Cheap), (900.0, Mode::Dear)];

/// What an acknowledgement costs the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Cheap,
    Dear,
}

impl Mode {
    fn of(bytes: f64) -> Self {
        MODES.iter().rfind(|(from, _)| bytes >= *from).map_or(Self::Cheap, |&(_, mode)| mode)
    }
}

/// A warning if `sides`, with the bytes on the wire of each one's deliveries, are acknowledged in different
/// modes.
pub fn warning(sides: &[(&str, f64)]) -> Option<String> {
    let with = |mode| {
        let those = sides.iter().filter(|&&(_, bytes)| Mode::of(bytes) == mode);
        those.map(|(name, bytes)| format!("{name} ({bytes:.0} bytes)")).collect::<Vec<_>>().join(", ")
    };
    let (cheap, dear) = (with(Mode::Cheap), with(Mode::Dear));
    (!cheap.is_empty() && !dear.is_empty()).then(|| {
        format!(
            "loopback acknowledges deliveries of {dear} on the server's time, and those of {cheap} later: CPU per delivery \
             differs by 1 to 2 µs for that alone; compare sides with as many bytes on the wire"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_in_different_modes_are_named() {
        assert_eq!(warning(&[]), None);
        assert_eq!(warning(&[("a", 260.0), ("b", 64.0), ("c", 700.0)]), None);
        assert_eq!(warning(&[("a", 377.0), ("b", 500.0), ("c", 1100.0)]), None);
        let words = warning(&[("bare loop", 260.0), ("server", 377.2), ("other", 64.0)]).unwrap();
        assert!(words.contains("deliveries of server (377 bytes) on the server's time"), "{words}");
        assert!(words.contains("those of bare loop (260 bytes), other (64 bytes) later"), "{words}");
    }
}
