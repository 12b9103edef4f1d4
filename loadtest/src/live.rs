//! The progress line on standard error while a run is under way.
//!
//! Without a terminal, nothing is written.

use std::{io::IsTerminal, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::{
    crew::Crew,
    report::{load::rate, written},
};

/// The line.
pub struct Live(ProgressBar);

impl Live {
    /// Shows the line, unless `quiet` is set or standard error is no terminal.
    pub fn new(quiet: bool) -> Self {
        if quiet || !std::io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed_precise} {prefix} {wide_msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    /// Shows the current activity.
    pub fn doing(&self, what: impl Into<String>) {
        self.0.set_prefix(what.into());
    }

    /// Shows the progress of `crew`.
    pub fn show(&self, crew: &Crew) {
        if self.0.is_hidden() {
            return;
        }
        let mut words = vec![format!("{} of {} ready", crew.totals.standing, crew.plan.clients())];
        let refused = crew.totals.refusals();
        if refused > 0 {
            words.push(format!("{refused} refused"));
        }
        if let Some(point) = crew.timeline.last() {
            if point.connected > 0.0 {
                words.push(format!("{} connected", rate(point.connected)));
            }
            if point.published > 0.0 {
                words.push(format!(
                    "{} published, {} delivered",
                    rate(point.published),
                    rate(point.delivered)
                ));
            }
            if let Some(p99) = point.p99 {
                words.push(format!("p99 {}", written(p99)));
            }
            if let Some(share) = point.server_share {
                words.push(format!("server {:.0}%", share * 100.0));
            }
        }
        let (expected, delivered) = crew.balance();
        if expected > 0 {
            words.push(format!("{} in flight", expected.saturating_sub(delivered)));
        }
        self.0.set_message(words.join(" | "));
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
