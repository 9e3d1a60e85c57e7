// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sources of a tracker: who is asked in a take, and in which order.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::handles::{SourceError, TakeError};
use super::harvest::harvest;
use super::log::{DirtyIovas, DirtyLog, IovaRange};
use super::report::Report;
use super::taken::Asked;
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
    /// Whether it was saved and is still to be added again.
    missing: bool,
    kind: Kind,
}

/// A source by its name, and for a log by IOVA the place of its view in a list.
pub(super) type Named = (Arc<str>, Option<usize>);

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

impl Kind {
    /// What distinguishes the view of a log from all others.
    fn view(&self) -> Option<usize> {
        match self {
            Kind::ByGuest(_) => None,
            Kind::ByIova { view, .. } => Some(view.key()),
        }
    }
}

impl Sources {
    pub(super) fn add(&mut self, name: &str, kind: Kind) -> u64 {
        let place = self.list.iter_mut().find(|source| {
            let same = source.kind.view() == kind.view() && *source.name == *name;
            source.missing && same
        });
        match place {
            // It comes back. Its view counts it already.
            Some(source) => {
                (source.kind, source.missing) = (kind, false);
                source.id
            }
            None => self.push(name, kind, false),
        }
    }

    fn push(&mut self, name: &str, kind: Kind, missing: bool) -> u64 {
        if let Kind::ByIova { view, .. } = &kind {
            view.write().add_log();
        }
        let (id, name) = (self.next, Arc::from(name));
        self.next += 1;
        self.list.push(Source {
            id,
            name,
            missing,
            kind,
        });
        id
    }

    /// Expects a source that was saved to be added again. Until then it fails. Returns
    /// its number.
    pub(super) fn expect(&mut self, name: &str, view: Option<IovaView>) -> u64 {
        const MISSING: &str = "it was saved, and is still to be added again";
        let kind = match view {
            Some(view) => Kind::ByIova {
                view,
                gap: 0,
                log: Box::new(|_: &[IovaRange], _: &mut DirtyIovas| Err(MISSING.into())),
                new: true,
            },
            None => Kind::ByGuest(Box::new(|_| Err(MISSING.into()))),
        };
        self.push(name, kind, true)
    }

    /// The views that have logs, and the sources.
    pub(super) fn saved(&self) -> (Vec<IovaView>, Vec<Named>) {
        let mut views: Vec<IovaView> = Vec::new();
        let mut places = HashMap::new();
        let sources = self.list.iter().map(|source| {
            let place = match &source.kind {
                Kind::ByGuest(_) => None,
                Kind::ByIova { view, .. } => Some(*places.entry(view.key()).or_insert_with(|| {
                    views.push(view.clone());
                    views.len() - 1
                })),
            };
            (Arc::clone(&source.name), place)
        });
        let sources = sources.collect();
        (views, sources)
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
