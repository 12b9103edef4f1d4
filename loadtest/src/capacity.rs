//! How large a fleet has to be: arithmetic from what one of everything costs, and no network.
//!
//! Owns the arithmetic ([`sizing`]), the unit costs that it rests on ([`costs`]) and how both are shown ([`report`]).
//! Measures nothing: that is what the other scenarios are for, and [`costs::TABLE`] says for each figure which one.
//!
//! Connections are taken to be spread evenly over nodes, and the members of a room independently of each other.

mod costs;
mod report;
mod sizing;

pub use self::costs::UnitCosts;
use self::{report::Report, sizing::Sizing};
use crate::{
    cli::Capacity,
    report::{Verdict, outputs::Outputs},
};

/// Calculates, and prints what came out.
pub fn run(args: &Capacity) -> anyhow::Result<Verdict> {
    let outputs = Outputs::open(args.json.as_deref(), None, None)?;
    let report = calculate(args)?;
    outputs.write(&report, &report, String::new, String::new)?;
    Ok(Verdict::AsExpected)
}

fn calculate(args: &Capacity) -> anyhow::Result<Report> {
    let Capacity { load, fleet, costs, .. } = args;
    let sizings = args.connections.iter().map(|&connections| Sizing::of(connections, load, fleet, costs));
    let sizings = sizings.collect::<Result<Vec<_>, _>>()?;
    Ok(Report { load: load.clone(), fleet: fleet.clone(), costs: costs.clone(), sizings })
}

#[cfg(test)]
mod tests;
