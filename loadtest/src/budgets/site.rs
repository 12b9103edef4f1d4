//! Replaces the words in braces of a budget's run, for a running node and for repeating it by hand.

use anyhow::{Context, bail};

use super::list::Budget;
use crate::workshop::{Node, Wanted, Workshop, free_port, local};

/// The paths where plain clients and Centrifuge clients connect.
const ROOMS: &str = "/rooms/load:{room}";
const CENTRIFUGE: &str = "/connection/websocket";

/// The environment in which a budget is measured.
pub struct Site<'a> {
    workshop: &'a Workshop,
    node: Option<Node>,
}

impl<'a> Site<'a> {
    /// Starts the node that `budget` needs, if any.
    pub fn open(workshop: &'a Workshop, budget: &Budget) -> anyhow::Result<Self> {
        let node = budget.node.as_ref().map(|wanted| workshop.node(wanted)).transpose()?;
        Ok(Self { workshop, node })
    }

    /// Replaces the words in braces of `run`.
    pub fn flags(&self, run: &str) -> anyhow::Result<Vec<String>> {
        let (mut flags, ops) = (Vec::new(), local(free_port()?));
        for word in run.split_whitespace() {
            let node = || self.node.as_ref().with_context(|| format!("{word} without a node"));
            match word {
                // The node's URL, its process, and a secret for its clients' tokens.
                "{node}" => flags.extend(node()?.flags(ROOMS)),
                // The same, with the Centrifuge protocol.
                "{centrifuge}" => {
                    flags.extend(node()?.flags(CENTRIFUGE));
                    flags.push("--protocol=centrifuge".into());
                }
                // Publish directly to the node's Redis.
                "{redis}" => {
                    let redis = node()?.redis.as_ref().context("{redis} without a Redis")?;
                    flags.push(format!("--publish={redis}"));
                }
                // Measure the node's Redis.
                "{on-redis}" => {
                    let redis = node()?.redis.as_ref().context("{on-redis} without a Redis")?;
                    flags.push(format!("--redis={redis}"));
                }
                // The gateway's program, for a scenario that starts it.
                "{program}" => flags.push(format!("--tidegate={}", self.workshop.tidegate()?.display())),
                // The URL of the node's metrics.
                "{metrics}" => flags.push(format!("--metrics=http://{}/metrics", node()?.ops)),
                // Processes compared with the node run on the same CPU.
                "{server-cpu}" => {
                    flags.extend(self.workshop.server_cpu.map(|cpu| format!("--server-cpu={cpu}")));
                }
                // A node that the scenario starts, and its readiness URL.
                "{ready}" => flags.push(format!("--ready=http://{ops}/readyz")),
                "{tidegate}" => flags.extend(self.program(&ops.to_string())?),
                word if word.starts_with('{') => bail!("{word} is not defined"),
                word => flags.push(word.to_owned()),
            }
        }
        Ok(flags)
    }

    fn program(&self, ops: &str) -> anyhow::Result<Vec<String>> {
        let pin = self.workshop.server_cpu.map(|cpu| ["taskset".into(), "-c".into(), cpu.to_string()]);
        let program = self.workshop.tidegate()?.to_string_lossy().into_owned();
        let listen = [format!("--ops-listen={ops}"), format!("--public-listen={}", local(free_port()?))];
        let words = pin.into_iter().flatten().chain([program]).chain(listen);
        Ok(words.chain(Wanted::default().flags()).collect())
    }
}

/// `run` as typed by somebody who has set the variables of [`preamble`].
pub fn typed(run: &str, workshop: &Workshop, more: &[String]) -> String {
    let mut words: Vec<String> = Vec::new();
    for (at, word) in run.split_whitespace().enumerate() {
        match word {
            "{node}" => words.push("$node".into()),
            "{centrifuge}" => words.push("$centrifuge".into()),
            "{redis}" => words.push("--publish=redis://127.0.0.1:6379".into()),
            "{on-redis}" => words.push("--redis=redis://127.0.0.1:6379".into()),
            "{program}" => {}
            "{metrics}" => words.push("--metrics=http://127.0.0.1:9090/metrics".into()),
            "{server-cpu}" => words.extend(workshop.server_cpu.map(|cpu| format!("--server-cpu={cpu}"))),
            "{ready}" => words.push("--ready=http://127.0.0.1:9090/readyz".into()),
            "{tidegate}" => words.push(server(workshop)),
            word => words.push(word.to_owned()),
        }
        if at == 0 {
            words.extend(workshop.client_cpu.map(|cpu| format!("--client-cpu={cpu}")));
            words.extend(more.iter().cloned());
        }
    }
    words.insert(0, "tidegate-loadtest".into());
    words.join(" ")
}

/// The shell lines before the commands that [`typed`] writes.
pub fn preamble(workshop: &Workshop) -> String {
    let flags = Wanted::default().flags().join(" ");
    format!(
        "export TIDEGATE_AUTH__HS256_SECRET=$(openssl rand -base64 48)\n\
         {} {flags} & pid=$!\n\
         who=\"--hs256-secret=$TIDEGATE_AUTH__HS256_SECRET --server-pid=$pid\"\n\
         node=\"--url=ws://127.0.0.1:8080{ROOMS} $who\"\n\
         centrifuge=\"--url=ws://127.0.0.1:8080{CENTRIFUGE} --protocol=centrifuge $who\"\n",
        server(workshop)
    )
}

/// The node's additional settings.
pub fn settings(wanted: &Wanted) -> Vec<String> {
    let mut words = Vec::new();
    if wanted.redis {
        words.push("--broker-url=redis://127.0.0.1:6379".to_owned());
    }
    if wanted.tls {
        words.push("--set=tls.cert=… --set=tls.key=… (wss:// and --ca=… in $node)".to_owned());
    }
    words.extend(wanted.set.iter().map(|(key, value)| format!("--set='{key}={value}'")));
    words
}

fn server(workshop: &Workshop) -> String {
    let pin = workshop.server_cpu.map(|cpu| format!("taskset -c {cpu} ")).unwrap_or_default();
    format!("{pin}tidegate")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{
        budgets::list::{BUDGETS, Found},
        cli::Cli,
    };

    fn workshop() -> Workshop {
        let tidegate = std::env::current_exe().ok();
        Workshop { tidegate, scratch: "/nowhere".into(), server_cpu: Some(0), client_cpu: Some(1) }
    }

    fn node() -> Node {
        let mut node = Node::elsewhere(local(1), local(2));
        node.redis = Some("redis://127.0.0.1:3".into());
        node
    }

    #[test]
    fn every_budget_is_a_valid_command_line() {
        let workshop = workshop();
        for budget in BUDGETS {
            let site = Site { workshop: &workshop, node: budget.node.map(|_| node()) };
            let other = match budget.found {
                Found::Stripped => continue,
                Found::Ratio { to, .. } => Some(to),
                _ => None,
            };
            for run in std::iter::once(budget.run).chain(other) {
                let flags = site.flags(run).unwrap();
                let words = std::iter::once("tidegate-loadtest".to_owned()).chain(flags);
                Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{}: {error}", budget.name));
                let typed = typed(run, &workshop, &["--rounds=5".into()]);
                assert!(typed.contains("--client-cpu=1 --rounds=5") && !typed.contains('{'), "{typed}");
            }
        }
    }

    #[test]
    fn names_are_unique() {
        for budget in BUDGETS {
            assert_eq!(
                BUDGETS.iter().filter(|other| other.name == budget.name).count(),
                1,
                "{}",
                budget.name
            );
        }
    }

    #[test]
    fn an_undefined_word_is_an_error() {
        let workshop = workshop();
        let site = Site { workshop: &workshop, node: None };
        assert!(site.flags("cost {node}").unwrap_err().to_string().contains("without a node"));
        assert!(site.flags("cost {what}").unwrap_err().to_string().contains("is not defined"));
        let flags = site.flags("start {ready} -- {tidegate}").unwrap();
        let at = flags[1].strip_prefix("--ready=http://").unwrap().strip_suffix("/readyz").unwrap();
        assert!(flags.contains(&format!("--ops-listen={at}")), "{flags:?}");
    }
}
