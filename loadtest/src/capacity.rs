//! How large a fleet has to be: arithmetic from unit costs, without any network.
//!
//! Owns the arithmetic ([`sizing`]), the unit costs ([`costs`]) and their presentation ([`report`]). Measures
//! nothing: the other scenarios do, and [`costs::TABLE`] names the one for each figure.
//!
//! Assumes that connections are spread evenly over nodes, and the members of a room independently of each
//! other.

mod costs;
mod report;
mod sizing;

pub use self::costs::UnitCosts;
use self::{report::Report, sizing::Sizing};
use crate::{
    cli::Capacity,
    report::{Verdict, outputs::Outputs},
};

/// Calculates and prints the result.
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
