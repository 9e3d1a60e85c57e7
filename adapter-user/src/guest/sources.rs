// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sources of a tracker: who is asked in a take, and in which order.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::handles::{SourceError, TakeError};
use super::harvest::harvest;
use super::log::DirtyLog;
use super::report::Report;
use super::stats::Asked;
use super::view::IovaView;
use super::whole::{Wholes, Why};
use crate::trace;

/// The sources, in the order in which they were added.
#[derive(Default)]
pub(super) struct Sources {
    list: Vec<Source>,
    /// The number of the next source.
    next: u64,
    /// Whether sources are being asked. If one of them panics, this stays set: what
    /// was read from the others is lost then.
    asking: bool,
    /// What each source told in the last take.
    pub(super) asked: Vec<Asked>,
}

struct Source {
    id: u64,
    name: Arc<str>,
    kind: Kind,
}

type ByGuest = dyn FnMut(&mut Report) -> Result<(), SourceError> + Send;

pub(super) enum Kind {
    /// ORs what it knows into a report.
    ByGuest(Box<ByGuest>),
    /// A log for the devices behind a view.
    ByIova {
        view: IovaView,
        gap: u64,
        log: Box<dyn DirtyLog>,
        /// Whether it was not read yet since tracking began.
        new: bool,
    },
}

impl Sources {
    pub(super) fn add(&mut self, name: &str, kind: Kind) -> u64 {
        if let Kind::ByIova { view, .. } = &kind {
            view.write().add_log();
        }
        let id = self.next;
        self.next += 1;
        let name = Arc::from(name);
        self.list.push(Source { id, name, kind });
        id
    }

    /// Tracking begins.
    pub(super) fn start(&mut self) {
        self.asking = false;
        for source in &mut self.list {
            if let Kind::ByIova { new, .. } = &mut source.kind {
                *new = true;
            }
        }
    }

    /// Asks every source, and returns the first failure. What logs have is in the
    /// slots' bits afterwards, and what the others have in the report. `asked` has
    /// what each of them told.
    pub(super) fn ask(&mut self, report: &mut Report, wholes: &Wholes) -> Result<(), TakeError> {
        self.asked.clear();
        if self.asking {
            report.set_all();
            let what = "a source panicked";
            wholes.add(Why::SourcePanicked, report.memory(), &what);
        }
        self.asking = true;
        let mut views = HashMap::new();
        for source in &self.list {
            if let Kind::ByIova { view, .. } = &source.kind {
                view.write().begin();
                views.insert(view.key(), view.clone());
            }
        }
        let mut result = Ok(());
        for source in &mut self.list {
            let (told, answer) = source.ask(report, wholes);
            self.asked.push(told);
            if let Err(failed) = answer {
                // A log that failed may have pages that the view must still translate
                // when it is read again.
                if let Kind::ByIova { view, .. } = &source.kind {
                    views.remove(&view.key());
                }
                result = result.and(Err(failed));
            }
        }
        for view in views.values() {
            view.write().finish();
        }
        self.asking = false;
        result
    }

    /// Removes a source. If `report` is given, the source is asked once more, and
    /// what it knows is in the report and in the slots' bits afterwards.
    pub(super) fn remove(
        &mut self,
        id: u64,
        report: Option<&mut Report>,
        wholes: &Wholes,
    ) -> Result<(), TakeError> {
        let Some(at) = self.list.iter().position(|source| source.id == id) else {
            return Ok(());
        };
        let mut source = self.list.remove(at);
        let result = match report {
            Some(report) => {
                // If the source panics, what it had told is lost, as in `ask`.
                let asking = std::mem::replace(&mut self.asking, true);
                let (_, answer) = source.ask(report, wholes);
                self.asking = asking;
                answer
            }
            None => Ok(()),
        };
        if let Kind::ByIova { view, .. } = &source.kind {
            view.write().remove_log();
        }
        result
    }
}

impl Source {
    /// Asks the source. If it fails, all is dirty that it may have: every page, or all
    /// memory behind the view of a log.
    fn ask(&mut self, report: &mut Report, wholes: &Wholes) -> (Asked, Result<(), TakeError>) {
        let _span = trace::source(&self.name);
        let began = Instant::now();
        let mut bytes = 0;
        let result = match &mut self.kind {
            Kind::ByGuest(source) => {
                let result = source(report);
                bytes = report.newly_told();
                result.inspect_err(|cause| {
                    report.set_all();
                    wholes.add(Why::SourceFailed, report.memory(), cause);
                })
            }
            Kind::ByIova {
                view,
                gap,
                log,
                new,
            } => harvest(view, &mut **log, *gap, *new, &mut bytes)
                .inspect(|()| *new = false)
                .inspect_err(|cause| view.mark_all(cause)),
        };
        trace::told(bytes);
        let asked = Asked {
            name: Arc::clone(&self.name),
            time: began.elapsed(),
            bytes,
            failed: result.is_err(),
        };
        let result = result.map_err(|cause| TakeError {
            source: self.name.to_string(),
            cause,
        });
        (asked, result)
    }
}
