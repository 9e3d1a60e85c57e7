// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sources of a tracker: who is asked in a take, and in which order.

use std::collections::HashMap;

use super::handles::{SourceError, TakeError};
use super::harvest::harvest;
use super::log::DirtyLog;
use super::report::Report;
use super::view::IovaView;

/// The sources, in the order in which they were added.
#[derive(Default)]
pub(super) struct Sources {
    list: Vec<Source>,
    /// The number of the next source.
    next: u64,
    /// Whether sources are being asked. If one of them panics, this stays set: what
    /// was read from the others is lost then.
    asking: bool,
}

struct Source {
    id: u64,
    name: String,
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
        let name = name.to_owned();
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
    /// slots' bits afterwards, and what the others have in the report.
    pub(super) fn ask(&mut self, report: &mut Report) -> Result<(), TakeError> {
        if self.asking {
            report.set_all();
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
            if let Err(failed) = source.ask(report) {
                match &source.kind {
                    Kind::ByGuest(_) => report.set_all(),
                    // A log that failed may have pages that the view must still
                    // translate when it is read again.
                    Kind::ByIova { view, .. } => drop(views.remove(&view.key())),
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
    pub(super) fn remove(&mut self, id: u64, report: Option<&mut Report>) -> Result<(), TakeError> {
        let Some(at) = self.list.iter().position(|source| source.id == id) else {
            return Ok(());
        };
        let mut source = self.list.remove(at);
        let result = match report {
            Some(report) => source.ask(report).inspect_err(|_| {
                if let Kind::ByGuest(_) = &source.kind {
                    report.set_all();
                }
            }),
            None => Ok(()),
        };
        if let Kind::ByIova { view, .. } = &source.kind {
            view.write().remove_log();
        }
        result
    }
}

impl Source {
    fn ask(&mut self, report: &mut Report) -> Result<(), TakeError> {
        let result = match &mut self.kind {
            Kind::ByGuest(source) => source(report),
            Kind::ByIova {
                view,
                gap,
                log,
                new,
            } => harvest(view, &mut **log, *gap, *new).inspect(|()| *new = false),
        };
        result.map_err(|cause| TakeError {
            source: self.name.clone(),
            cause,
        })
    }
}
