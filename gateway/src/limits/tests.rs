use super::*;
use crate::config::{Config, Sources};

/// All limits off, except for those in `set`.
pub(crate) fn limits(set: &[(&str, &str)]) -> config::Limits {
    const ALL: [&str; 7] = [
        "accepts",
        "attempts_per_address",
        "connections_per_address",
        "commands",
        "bytes",
        "user_commands",
        "user_bytes",
    ];
    let off = ALL.into_iter().map(|name| (format!("limits.{name}"), "off".to_owned()));
    let set = set.iter().map(|(name, value)| (format!("limits.{name}"), (*value).to_owned()));
    let small = ("limits.message_size".to_owned(), "512B".to_owned());
    let flags = off.chain([small]).chain(set).collect();
    Config::load(&Sources { flags, ..Sources::default() }).unwrap_or_else(|errors| panic!("{errors}")).limits
}

fn address(n: u32) -> IpAddr {
    IpAddr::V4(n.into())
}

#[test]
fn frequent_attempts_are_refused_and_then_dropped() {
    let limiters = Limiters::new(&limits(&[("attempts_per_address", "1/h burst 3")]), Time::default());
    let decide = |n| {
        let decisions: Vec<_> = (0..20).map(|_| limiters.admit(address(n), None)).collect();
        let accepted = decisions.iter().filter(|decision| matches!(decision, Decision::Accept(None))).count();
        let refused = decisions
            .iter()
            .filter(|decision| matches!(decision, Decision::Refuse(AddressLimit::Attempts(wait), _) if wait.as_secs() > 3_500))
            .count();
        (accepted, refused)
    };
    assert_eq!(decide(1), (3, 10));
    assert_eq!(decide(2), (3, 10), "another address is another account");
}

#[test]
fn open_connections_are_counted_while_they_are_open() {
    let limiters = Limiters::new(&limits(&[]), Time::default());
    let decisions: Vec<_> = (0..2).map(|_| limiters.admit(address(1), Some(2))).collect();
    assert!(decisions.iter().all(|decision| matches!(decision, Decision::Accept(Some(_)))));
    assert!(matches!(limiters.admit(address(1), Some(2)), Decision::Refuse(AddressLimit::Connections, _)));
    assert!(matches!(limiters.admit(address(2), Some(2)), Decision::Accept(Some(_))));
    drop(decisions);
    assert!(matches!(limiters.admit(address(1), Some(2)), Decision::Accept(Some(_))));
}

#[test]
fn answered_refusals_are_bounded() {
    let limiters = Limiters::new(&limits(&[("attempts_per_address", "1/h")]), Time::default());
    let attempts: Vec<_> = (0..1000)
        .flat_map(|n| [limiters.admit(address(n), None), limiters.admit(address(n), None)])
        .collect();
    let refused =
        |decisions: &[Decision]| decisions.iter().filter(|v| matches!(v, Decision::Refuse(..))).count();
    assert_eq!(refused(&attempts), RefusalPermit::MAX);
    drop(attempts);
    assert_eq!(refused(&[limiters.admit(address(5), None)]), 1, "permits are free again");
}

/// Addresses and users that have come, been refused and gone leave nothing behind.
#[test]
fn clients_that_are_gone_leave_nothing() {
    let limiters = Limiters::new(
        &limits(&[
            ("attempts_per_address", "1000000/s burst 2"),
            ("user_commands", "1000000/s burst 2"),
            ("user_bytes", "1000000/s burst 1000"),
        ]),
        Time::default(),
    );
    for n in 0..100_000 {
        drop(limiters.admit(address(n), Some(1)));
        let user = Subject::new(&format!("user {n}")).unwrap();
        assert_eq!((limiters.user_command(&user), limiters.user_bytes(&user, 10)), (Ok(()), Ok(())));
    }
    // The buckets are full again after two microseconds, which is less than a sweep takes.
    limiters.sweep();
    limiters.sweep();
    assert_eq!(limiters.accounts(), 0);
}

#[test]
fn changed_rates_start_anew_and_others_go_on() {
    let first = limits(&[("user_commands", "1/h burst 2"), ("attempts_per_address", "1/h burst 2")]);
    let limiters = Limiters::new(&first, Time::default());
    let alice = Subject::new("alice").unwrap();
    let commands = || (0..10).filter(|_| limiters.user_command(&alice).is_ok()).count();
    let attempts =
        || (0..10).filter(|_| matches!(limiters.admit(address(1), None), Decision::Accept(_))).count();
    assert_eq!((commands(), attempts()), (2, 2));
    limiters.adopt(&first);
    assert_eq!((commands(), attempts()), (0, 0));
    limiters.adopt(&limits(&[("user_commands", "1/h burst 3"), ("attempts_per_address", "1/h burst 2")]));
    assert_eq!((commands(), attempts()), (3, 0));
    limiters.adopt(&limits(&[]));
    assert_eq!((commands(), attempts()), (10, 10));
}
