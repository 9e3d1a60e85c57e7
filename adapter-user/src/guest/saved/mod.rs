// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tracker becomes bytes, and another one goes on with them: live upgrade.

mod error;
mod layout;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

pub use self::error::RestoreError;

use self::layout::{Departed, Saved, SavedMapping, SavedPart, SavedSource, Writer};
use self::layout::{MOST_MAPPINGS, MOST_PARTS};
use super::handles::Source;
use super::harvest::mark_all;
use super::mapping::Mapping;
use super::report::Report;
use super::slots::{mark_whole, Slot, State, MAX_DEPARTED};
use super::tracker::{Inner, Tracker};
use super::view::IovaView;
use super::whole::Why;
use crate::dirty_bits::start;
use crate::error::TrackError;

/// What [`Tracker::restore`] returns: the sources that the caller must add again. It is
/// empty if the saved tracker was off.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Restored {
    /// The sources that the saved tracker had, in the order in which they were added.
    pub sources: Vec<RestoredSource>,
}

/// A source that a saved tracker had. Until a source of this name is added, each take
/// fails, and everything counts as dirty that the source may have.
#[non_exhaustive]
pub struct RestoredSource {
    /// The name that the source was added with.
    pub name: String,
    /// For a log by IOVA, the view to add it with. It has no mappings: make those that
    /// the devices have. It remembers the mappings of the old view until its logs were
    /// read.
    pub view: Option<IovaView>,
    /// A handle to remove it, if it does not come back.
    pub source: Source,
}

impl fmt::Debug for RestoredSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestoredSource")
            .field("name", &self.name)
            .field("is_log", &self.view.is_some())
            .finish_non_exhaustive()
    }
}

impl Restored {
    /// Returns the view of the first log by IOVA that has this name.
    #[must_use]
    pub fn view(&self, name: &str) -> Option<&IovaView> {
        let mut logs = self.sources.iter().filter(|source| source.name == name);
        logs.find_map(|source| source.view.as_ref())
    }
}

impl Tracker {
    /// Returns the tracker as bytes, from which [`restore`](Tracker::restore) goes on in
    /// another process: a live upgrade of the VMM in the middle of a migration.
    /// docs/live-upgrade.md has the whole order of steps, and the format.
    ///
    /// Before the call, stop everything that marks or maps in this process: CPUs, devices,
    /// the VMM's own threads. What they mark after it is not in the bytes. A device that
    /// has its log elsewhere may go on writing, as long as its mappings stay.
    ///
    /// The call asks every source once more, as [`take`](Tracker::take) does. So a log
    /// that dies with this process, as a [`DeviceLog`](crate::device_log::DeviceLog) or
    /// KVM's, has nothing left that is not in the bytes. If a source fails, what would
    /// count as dirty in a take is dirty in the bytes.
    ///
    /// `undelivered` is the report of the migration, whose pages have not arrived; give
    /// `&Report::new()` if there is none. The bytes have its pages. What it has of
    /// [removed](Report::removed) slots is not in the bytes, and neither are the bits of
    /// a removed slot: if it comes back, [`add`](Tracker::add) it, as all of it is dirty
    /// then.
    ///
    /// The tracker stays as it is and keeps all that is dirty, so the migration can go on
    /// here if the new process does not start.
    ///
    /// # Errors
    ///
    /// In this order. What sources told stays dirty in the tracker:
    ///
    /// - [`TrackError::OtherTracker`] if the report is one of another tracker.
    /// - [`TrackError::NoMemory`] if there is no memory for the bytes.
    pub fn save(&self, undelivered: &Report) -> Result<Vec<u8>, TrackError> {
        let slots = &self.inner.slots;
        if undelivered.tracker().is_some_and(|id| id != slots.id) {
            return Err(TrackError::OtherTracker);
        }
        let mut sources = self.inner.sources();
        if !slots.read().on {
            return Writer::new(false).finish(0);
        }
        let mut told = Report::new();
        told.follow(slots.id, &slots.read());
        let departed = slots.departed();
        if sources.ask(&mut told, &slots.wholes).is_ok() {
            slots.forget(departed);
        }
        told.give_back();

        let (views, sources) = sources.saved();
        let mappings = saved_mappings(&views);
        let state = slots.read();
        let places = state.list.iter().enumerate();
        let places: HashMap<usize, usize> =
            places.map(|(at, slot)| (slot.bits.key(), at)).collect();
        let mut out = Writer::new(true);
        let bitmaps = state.used();
        out.reserve(bitmaps)?;
        out.count(state.list.len());
        for slot in &state.list {
            let mut words = vec![0; slot.bits.words()];
            slot.bits.read(&mut words)?;
            undelivered.or_into(slot, &mut words);
            out.slot(slot, &words);
        }
        let departed = state.departed.iter();
        let departed = departed.filter_map(|old| saved_departed(old, &places));
        let departed: Vec<Departed> = departed.collect();
        out.count(departed.len());
        departed.iter().for_each(|departed| out.departed(departed));
        out.count(sources.len());
        for (name, view) in &sources {
            let (name, view) = (&**name, *view);
            out.source(&SavedSource { name, view });
        }
        out.count(mappings.len());
        for view in &mappings {
            out.count(view.len());
            for mapping in view {
                out.mapping(&saved_mapping(mapping, &places));
            }
        }
        out.finish(bitmaps)
    }

    /// Goes on where the tracker was that [`save`](Tracker::save) made `saved` of, in
    /// another process. docs/live-upgrade.md has the whole order of steps.
    ///
    /// Before the call, add the same slots, with their numbers, guest addresses, sizes
    /// and page sizes; host addresses may differ. Nothing may have written guest memory
    /// in this process yet. The call switches the tracker on, if the saved one was on.
    ///
    /// After the call and before the first take, add each source of [`Restored`] again,
    /// under its name, and logs by IOVA with the view that `Restored` has for them. A
    /// source that does not come back is removed by its handle. Until then each take
    /// fails with the source's name, and has every page, or all memory behind the view of
    /// a log. Map in the views what the devices have mapped, before they write.
    ///
    /// A slot that was not saved is dirty as a whole.
    ///
    /// It takes the memory of one slot's bitmap for a while. For the rest it takes at most
    /// 32 times the bytes that `saved` has beside bitmaps, and it refuses more than 16 MiB
    /// of these.
    ///
    /// # Errors
    ///
    /// In this order. **Every page is dirty then**, the tracker is on, and there is no
    /// source or view of the saved one: logs that are added may tell more, but nothing is
    /// lost. So the caller may go on with a round that sends all memory.
    ///
    /// - [`RestoreError::Damaged`] or [`RestoreError::Version`] if the bytes are not those
    ///   of a save by this version of the format.
    /// - [`RestoreError::Slot`] if a saved slot is not in the tracker as it was.
    /// - [`RestoreError::Start`]: the tracker cannot be switched on. It is off, so each
    ///   take has every page.
    pub fn restore(&self, saved: &[u8]) -> Result<Restored, RestoreError> {
        // No take, start or stop, and no new view meanwhile.
        let mut sources = self.inner.sources();
        let mut views = self.inner.views();
        let slots = &self.inner.slots;
        let mut state = slots.write();
        let result = check(saved, &state);
        if let Ok(None) = result {
            return Ok(Restored::default());
        }
        // What is marked already stays marked.
        let bits = state.list.iter().map(|slot| &slot.bits);
        start(bits, false).map_err(RestoreError::Start)?;
        state.on = true;
        let (saved, of) = match result {
            Ok(saved) => saved.unwrap_or_default(), // there is one
            Err(cause) => {
                for slot in &state.list {
                    mark_whole(slot, 0, &slots.wholes, Why::RestoreFailed, &cause);
                }
                drop(state);
                Inner::tell_views(&mut views, true);
                return Err(cause);
            }
        };
        for slot in &state.list {
            match of.iter().position(|old| old.id == slot.id) {
                Some(at) => {
                    // The bits are on and open, so they take every mark.
                    let words: Vec<u64> = saved.slots[at].words().collect();
                    let _ = slot.bits.mark_words(&words);
                }
                None => {
                    let what = "it was not saved";
                    mark_whole(slot, 0, &slots.wholes, Why::NewMemory, &what);
                }
            }
        }
        let departed = saved.departed.iter().map(|old| Slot {
            gpa: old.gpa,
            size: old.size,
            ..of[old.slot].clone()
        });
        state.departed.extend(departed);
        drop(state);
        Inner::tell_views(&mut views, true);
        sources.start();

        let restored = saved.views.iter().map(|mappings| {
            let view = IovaView::new(Arc::clone(slots), true);
            let mappings = (0..).zip(mappings).map(|(number, saved)| {
                let parts = saved.parts.iter();
                let parts = parts.map(|part| (part.first, part.last, &of[part.slot], part.at));
                let (iova, gpa, size) = (saved.iova, saved.gpa, saved.size);
                Mapping::restored((iova, gpa, size), number, parts, slots)
            });
            view.write().remember_restored(mappings);
            views.push(view.downgrade());
            view
        });
        let restored: Vec<IovaView> = restored.collect();
        let sources = saved.sources.iter().map(|source| {
            let view = source.view.map(|view| restored[view].clone());
            RestoredSource {
                name: source.name.to_owned(),
                source: Source {
                    id: sources.expect(source.name, view.clone()),
                    tracker: Arc::downgrade(&self.inner),
                },
                view,
            }
        });
        Ok(Restored {
            sources: sources.collect(),
        })
    }
}

/// A saved tracker that was on, and the slots that it has, as they are now.
type Checked<'a> = (Saved<'a>, Vec<Slot>);

/// Checks that `saved` is what a save returned of a tracker with slots of these. It is
/// `None` if that tracker was off.
fn check<'a>(saved: &'a [u8], state: &State) -> Result<Option<Checked<'a>>, RestoreError> {
    let Some(saved) = Saved::parse(saved, state.used())? else {
        return Ok(None);
    };
    if saved.departed.len() > MAX_DEPARTED {
        return Err(RestoreError::Damaged);
    }
    let by_id: HashMap<u32, &Slot> = state.list.iter().map(|slot| (slot.id, slot)).collect();
    let slots = saved.slots.iter().map(|old| {
        let slot = by_id.get(&old.id).filter(|slot| {
            let same = (slot.gpa, slot.size) == (old.gpa, old.size);
            same && slot.bits.pgsize() == old.pgsize
        });
        let slot = slot.ok_or(RestoreError::Slot { id: old.id })?;
        Ok(Slot::clone(slot))
    });
    let slots = slots.collect::<Result<Vec<Slot>, RestoreError>>()?;
    let ids: HashSet<u32> = slots.iter().map(|slot| slot.id).collect();
    match ids.len() == slots.len() {
        true => Ok(Some((saved, slots))),
        false => Err(RestoreError::Damaged), // one of them twice
    }
}

/// The mappings through which the logs of each view may still report writes. Those
/// that are too many to save are marked.
fn saved_mappings(views: &[IovaView]) -> Vec<Vec<Mapping>> {
    let (mut mappings, mut parts) = (MOST_MAPPINGS, MOST_PARTS);
    let mut fits = |mapping: &Mapping| {
        let left = parts.checked_sub(mapping.bound().count());
        let left = mappings.checked_sub(1).zip(left);
        left.inspect(|left| (mappings, parts) = *left).is_some()
    };
    let saved = views.iter().map(|view| {
        let all = view.read().all();
        let (saved, rest): (Vec<Mapping>, _) = all.into_iter().partition(&mut fits);
        if !rest.is_empty() {
            let what = "131072 mappings are saved";
            mark_all(view, &rest, Why::ForgottenMapping, &what);
        }
        saved
    });
    saved.collect()
}

fn saved_departed(old: &Slot, places: &HashMap<usize, usize>) -> Option<Departed> {
    let (gpa, size) = (old.gpa, old.size);
    let slot = *places.get(&old.bits.key())?;
    Some(Departed { slot, gpa, size })
}

/// A mapping without the parts that lead to slots which are gone. A mark in such a part
/// counts for what is at its guest address, with them and without.
fn saved_mapping(mapping: &Mapping, places: &HashMap<usize, usize>) -> SavedMapping {
    let parts = mapping.bound().filter_map(|(first, last, bits, at)| {
        let slot = *places.get(&bits.key())?;
        Some(SavedPart {
            first,
            last,
            slot,
            at,
        })
    });
    SavedMapping {
        iova: mapping.iova(),
        gpa: mapping.gpa(),
        size: mapping.size(),
        parts: parts.collect(),
    }
}
