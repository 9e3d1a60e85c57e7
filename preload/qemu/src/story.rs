// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs a case.

use std::path::Path;

use serde_json::{json, Value};

use crate::case::{Case, Expected, Place, Story};
use crate::check;
use crate::drive::{engine, go_on, pause, ring};
use crate::guest::Guests;
use crate::launch::{arguments, devices, GROUP};
use crate::qemu::{command, sysfs, Places, Qemu, Version};
use crate::server::Server;
use crate::Result;

/// Bytes a second, at first: so slow that the guest works through several rounds of copies.
const SLOW: u64 = 4 << 20;
/// When so many bytes are sent, those that the engine writes are among them: they come before
/// the guest's filler, of which much is left.
const SENT: u64 = 7 << 19;
/// So slow that sending the filler takes longer than some rounds of the guest.
const SLOWEST: u64 = 256 << 10;
const FAST: u64 = 8 << 30;
/// Bytes a second that QEMU is to think it can send while the guest is stopped. In the
/// millisecond that it may then be stopped for, not even the device's state can be sent: so
/// the migration does not end before it is to.
const NEARLY_NOTHING: u64 = 100_000;
/// Milliseconds that the guest may be stopped for in the end. Zero pages take few bytes, so
/// QEMU thinks that the link is slow.
const DOWNTIME: u64 = 60_000;
/// Where memory is plugged in, and its bytes.
const PLUGGED: u64 = 4 << 30;
const PLUGGED_SIZE: u64 = 128 << 20;

/// What came of a case.
pub(crate) struct Seen {
    pub(crate) what: Expected,
    /// What should not be, besides.
    pub(crate) wrong: Vec<String>,
}

struct Run<'a> {
    places: &'a Places,
    guests: &'a Guests,
    case: &'a Case,
    folder: &'a Path,
}

/// Runs a case in an empty folder.
pub(crate) fn run(places: &Places, guests: &Guests, case: &Case, folder: &Path) -> Result<Seen> {
    let run = Run {
        places,
        guests,
        case,
        folder,
    };
    match case.story {
        Story::Unplug => return run.unplug(),
        Story::Work => return run.work(),
        _ => {}
    }
    let destination = run.start(case.to, "destination", true);
    if let (Story::Refused(words), Err(error)) = (case.story, &destination) {
        return Ok(Seen {
            what: Expected::Refused,
            wrong: unless_it_says(words, &error.to_string()),
        });
    }
    let mut destination = destination?;
    let mut source = run.start(case.from, "source", false)?;
    if !source.wait_rounds(3)? {
        return Err(format!(
            "the guest is wrong before it migrates: {}",
            source.text("serial")
        )
        .into());
    }
    run.set_up(&mut source, &mut destination)?;
    match case.story {
        Story::Refused(words) => return run.refused(source, destination, words),
        Story::CancelAndAgain => {
            run.begin(&mut source)?;
            source.run("migrate_cancel", json!({}))?;
            run.ended(&mut source, "cancelled")?;
            destination = run.again(&mut source, destination)?;
        }
        Story::FailAndAgain(name, errno) => {
            run.fail(&mut source, name, errno)?;
            destination = run.again(&mut source, destination)?;
        }
        Story::ScatteredPins => {
            // Above what the guest uses.
            let size = 544 << 20;
            let pins = (size / 8192) as u32;
            engine(&mut source, 3, 32 << 20, pins, 0)?;
        }
        Story::ServerDies => return run.server_dies(source, destination),
        Story::Migrate | Story::Unmarked | Story::PlugMemory | Story::Unplug | Story::Work => {}
    }
    run.begin(&mut source)?;
    run.late(&mut source)?;
    let (memory, first, good) = run.arrive(&mut source, &mut destination)?;
    let mut wrong = match case.place {
        Place::Stock => Vec::new(), // there is no trace of answers
        _ => check::reports(case, &source),
    };
    let what = match (memory, good) {
        (0, true) => Expected::Same,
        (_, false) => Expected::Stale,
        (_, true) if case.story == Story::Unmarked => Expected::Stale, // not the guest's page
        (pages, true) => {
            wrong.push(format!("{pages} pages differ, the first at {first:#x?}, and the guest says that all is good"));
            Expected::Stale
        }
    };
    if memory == 0 && !good {
        wrong.push(format!(
            "memory is the same, and the guest says: {}",
            destination.text("serial")
        ));
    }
    for qemu in [&mut source, &mut destination] {
        run.end(qemu, &mut wrong)?;
    }
    Ok(Seen { what, wrong })
}

impl Run<'_> {
    fn start(&self, version: Version, name: &str, incoming: bool) -> Result<Qemu> {
        let preload = self.case.place != Place::Stock;
        let mut command = command(self.places, version, preload)?;
        let socket = self.folder.join(format!("{name}.device"));
        let server = match self.case.place {
            Place::Library => None,
            Place::Server | Place::Stock => {
                let said = self.folder.join(format!("{name}.server"));
                Some(Server::start(&self.places.server, &socket, &said)?)
            }
        };
        arguments(&mut command, self.case, self.guests)?;
        devices(&mut command, self.case, self.folder, &socket)?;
        if incoming {
            command.args(["-S", "-incoming", "defer"]);
        } else if self.case.story == Story::Unplug {
            command.arg("-S");
        }
        let mut qemu = Qemu::start(command, self.folder, name)?;
        qemu.server = server;
        Ok(qemu)
    }

    /// Ends a QEMU, and looks for what it leaves.
    fn end(&self, qemu: &mut Qemu, wrong: &mut Vec<String>) -> Result<()> {
        qemu.quit()?;
        if self.case.place != Place::Stock {
            wrong.extend(check::left(qemu));
        }
        Ok(())
    }

    fn socket(&self) -> String {
        format!("unix:{}", self.folder.join("migration").display())
    }

    /// Sets capabilities, and lets the destination listen.
    fn set_up(&self, source: &mut Qemu, destination: &mut Qemu) -> Result<()> {
        let capabilities: Vec<Value> = self
            .case
            .capabilities
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        for qemu in [&mut *source, &mut *destination] {
            if self.case.story == Story::PlugMemory {
                let memory =
                    json!({"qom-type": "memory-backend-ram", "id": "more", "size": PLUGGED_SIZE});
                qemu.run("object-add", memory)?;
                let module =
                    json!({"driver": "pc-dimm", "id": "module", "memdev": "more", "addr": PLUGGED});
                qemu.run("device_add", module)?;
            }
            if !capabilities.is_empty() && !matches!(self.case.story, Story::Refused(_)) {
                qemu.run(
                    "migrate-set-capabilities",
                    json!({"capabilities": capabilities}),
                )?;
            }
        }
        if self.case.story == Story::PlugMemory {
            engine(source, 3, PLUGGED, 16, 0)?; // pins
            engine(source, 1, PLUGGED + (8 << 20), 512, 0xfeed)?;
        }
        destination.run("migrate-incoming", json!({"uri": self.socket()}))?;
        Ok(())
    }

    /// Lets QEMU send `bandwidth` bytes a second, and not end the migration.
    fn hold(&self, source: &mut Qemu, bandwidth: u64) -> Result<()> {
        self.limits(source, bandwidth, 1, NEARLY_NOTHING)
    }

    /// Sets bytes a second, the milliseconds that the guest may be stopped for, and the bytes a
    /// second that QEMU counts on then.
    fn limits(&self, source: &mut Qemu, bandwidth: u64, downtime: u64, then: u64) -> Result<()> {
        let mut limits = json!({"max-bandwidth": bandwidth, "downtime-limit": downtime});
        if self.case.from != Version::V7 {
            limits["avail-switchover-bandwidth"] = then.into();
        }
        source.run("migrate-set-parameters", limits)?;
        Ok(())
    }

    /// Begins to migrate, and waits until some rounds of copies are over.
    fn begin(&self, source: &mut Qemu) -> Result<()> {
        self.hold(source, SLOW)?;
        if !self.case.quiet() {
            self.migrate(source)?;
            return source.wait("third round of copies", |source| {
                let now = source.run("query-migrate", json!({}))?;
                going(&now)?;
                Ok((syncs(&now) >= 3).then_some(()))
            });
        }
        // The guest works only while QEMU copies for the first time, and when it has copied
        // what the engine writes.
        pause(source)?;
        self.migrate(source)?;
        source.wait("copy of what the engine writes", |source| {
            let now = source.run("query-migrate", json!({}))?;
            going(&now)?;
            let sent = now["ram"]["transferred"].as_u64().unwrap_or(0);
            Ok((syncs(&now) >= 1 && sent > SENT).then_some(()))
        })?;
        self.hold(source, SLOWEST)?;
        if let Some(lose) = self.case.lose {
            source.control(&format!("lose {lose}"))?;
        }
        go_on(source)?;
        source.wait_rounds(4)?;
        pause(source)?;
        let now = source.run("query-migrate", json!({}))?;
        match syncs(&now) {
            1 => Ok(()),
            more => Err(
                format!("QEMU looked for dirty pages {more} times while the guest worked").into(),
            ),
        }
    }

    fn migrate(&self, source: &mut Qemu) -> Result<()> {
        source.run("migrate", json!({"uri": self.socket()}))?;
        Ok(())
    }

    /// What happens when most memory has been copied.
    fn late(&self, source: &mut Qemu) -> Result<()> {
        if self.case.quiet() {
            return Ok(());
        }
        if let Some(lose) = self.case.lose {
            source.control(&format!("lose {lose}"))?;
        }
        match self.case.story {
            // A page that the guest does not use.
            Story::Unmarked => engine(source, 7, 0x1c0_0000, 1, 0x5eed)?,
            Story::PlugMemory => engine(source, 1, PLUGGED + (1 << 20), 256, 0x5eed)?,
            _ => {}
        }
        // QEMU still has to send pages that it knew of before. It looks again when that is done,
        // so what the guest does after two more looks is only in later reports.
        let before = syncs(&source.run("query-migrate", json!({}))?);
        source.wait("round of copies", |source| {
            let now = source.run("query-migrate", json!({}))?;
            going(&now)?;
            Ok((syncs(&now) >= before + 2).then_some(()))
        })?;
        source.wait_rounds(2)?;
        Ok(())
    }

    /// All of guest memory.
    fn memory(&self, qemu: &mut Qemu) -> Result<Vec<u8>> {
        let mut memory = qemu.memory(0, self.case.memory << 20)?;
        if self.case.story == Story::PlugMemory {
            memory.extend(qemu.memory(PLUGGED, PLUGGED_SIZE)?);
        }
        Ok(memory)
    }

    /// Lets the migration end, compares the memories, and lets the destination run: how many
    /// pages differ, the first of them, and whether the guest finds its memory right.
    fn arrive(
        &self,
        source: &mut Qemu,
        destination: &mut Qemu,
    ) -> Result<(usize, Option<usize>, bool)> {
        self.limits(source, FAST, DOWNTIME, FAST)?;
        self.ended(source, "completed")?;
        let here = self.memory(source)?;
        destination.wait("arrival", |destination| {
            let now = destination.run("query-migrate", json!({}))?;
            Ok((now["status"] == "completed").then_some(()))
        })?;
        let there = self.memory(destination)?;
        let (pages, first) = check::difference(&here, &there);
        destination.run("cont", json!({}))?;
        destination.wait_status("running")?;
        if self.case.quiet() {
            go_on(destination)?;
        }
        Ok((pages, first, destination.wait_rounds(3)?))
    }

    /// Waits until the migration is over, which must be so.
    fn ended(&self, source: &mut Qemu, how: &str) -> Result<()> {
        source.wait("end of the migration", |source| {
            let now = source.run("query-migrate", json!({}))?;
            let status = now["status"].as_str().unwrap_or_default();
            match status {
                "completed" | "failed" | "cancelled" if status != how => Err(format!(
                    "the migration has {status}, and not {how}: {}",
                    now["error-desc"]
                )
                .into()),
                _ => Ok((status == how).then_some(())),
            }
        })
    }

    /// Lets a migration fail.
    fn fail(&self, source: &mut Qemu, name: &str, errno: i32) -> Result<()> {
        let fail = format!("fail {name} {errno}");
        if name == "start" {
            self.hold(source, SLOW)?;
            source.control(&fail)?;
            let _ = self.migrate(source); // it may fail at once
        } else {
            self.begin(source)?;
            source.control(&fail)?;
        }
        // Tracking is stopped when a migration is cancelled, and that it fails changes nothing.
        let end = if name == "stop" {
            "cancelled"
        } else {
            "failed"
        };
        if name == "stop" {
            source.run("migrate_cancel", json!({}))?;
        }
        self.ended(source, end)?;
        source.wait("ioctl that fails", |source| {
            let trace = source.text("trace");
            let mut lines = trace.lines().filter_map(|line| line.split_once(' '));
            let failed = |line: &str| line.starts_with(name) && !line.ends_with("ok");
            Ok(lines.any(|(_, line)| failed(line)).then_some(()))
        })
    }

    /// After a migration that was not to arrive: the guest goes on, and there is another
    /// destination.
    fn again(&self, source: &mut Qemu, mut destination: Qemu) -> Result<Qemu> {
        destination.wait_end_or_quit()?;
        source.wait_status("running")?;
        if self.case.quiet() {
            go_on(source)?;
        }
        if !source.wait_rounds(2)? {
            return Err("the guest is wrong after a migration that did not arrive".into());
        }
        let mut destination = self.start(self.case.to, "destination-2", true)?;
        self.set_up(source, &mut destination)?;
        Ok(destination)
    }

    /// Plugs the device in and out while no guest runs, so that none has to let it go.
    fn unplug(&self) -> Result<Seen> {
        let mut qemu = self.start(self.case.from, "source", false)?;
        let place = sysfs(self.folder, GROUP, "dev0")?;
        let device = json!({
            "driver": "vfio-pci", "id": "dev0", "bus": "root0", "sysfsdev": place, "enable-migration": "on",
        });
        let mut wrong = Vec::new();
        for round in 1..=3 {
            qemu.run("device_add", device.clone())?;
            // Memory and bus master, in the command register.
            qemu.control("set dev0 0x70000000004 6")?;
            ring(&mut qemu, 3, 0x80_0000, 8, 0)?; // pins
            qemu.run("device_del", json!({"id": "dev0"}))?;
            qemu.wait("end of the device", |qemu| {
                qemu.run("query-status", json!({}))?;
                Ok((qemu.events("DEVICE_DELETED") >= round).then_some(()))
            })?;
            let status = qemu.control("status")?;
            if status != "open=0 charged=0" {
                wrong.push(format!("after it was unplugged: {status}"));
            }
        }
        qemu.quit()?;
        wrong.extend(check::left(&qemu));
        Ok(Seen {
            what: Expected::Gone,
            wrong,
        })
    }

    /// Lets the guest work, which checks its memory.
    fn work(&self) -> Result<Seen> {
        let mut qemu = self.start(self.case.from, "source", false)?;
        let good = qemu.wait_rounds(5)?;
        let mut wrong = Vec::new();
        if !good {
            wrong.push(format!("the guest says: {}", qemu.text("serial")));
        }
        self.end(&mut qemu, &mut wrong)?;
        Ok(Seen {
            what: if good {
                Expected::Same
            } else {
                Expected::Stale
            },
            wrong,
        })
    }

    fn server_dies(&self, mut source: Qemu, mut destination: Qemu) -> Result<Seen> {
        self.begin(&mut source)?;
        let server = source.server.as_mut().ok_or("there is no server")?;
        server.kill()?;
        // The last report fails at the latest, or the change of the device's state.
        self.limits(&mut source, FAST, DOWNTIME, FAST)?;
        self.ended(&mut source, "failed")?;
        destination.wait_end_or_quit()?;
        source.wait_status("running")?;
        let mut wrong = Vec::new();
        self.end(&mut source, &mut wrong)?;
        Ok(Seen {
            what: Expected::Failed,
            wrong,
        })
    }

    fn refused(&self, mut source: Qemu, mut destination: Qemu, words: &str) -> Result<Seen> {
        let capabilities: Vec<Value> = self
            .case
            .capabilities
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        let set = source.run(
            "migrate-set-capabilities",
            json!({"capabilities": capabilities}),
        );
        let refused = set.and_then(|_| self.migrate(&mut source));
        let mut wrong = match refused {
            Ok(()) => vec!["QEMU does not refuse".into()],
            Err(error) => unless_it_says(words, &error.to_string()),
        };
        if !source.wait_rounds(1)? {
            wrong.push("the guest is wrong then".into());
        }
        for qemu in [&mut source, &mut destination] {
            self.end(qemu, &mut wrong)?;
        }
        Ok(Seen {
            what: Expected::Refused,
            wrong,
        })
    }
}

fn unless_it_says(words: &str, error: &str) -> Vec<String> {
    match error.to_lowercase().contains(&words.to_lowercase()) {
        true => Vec::new(),
        false => vec![format!("QEMU refuses, and says: {error}")],
    }
}

fn syncs(now: &Value) -> u64 {
    now["ram"]["dirty-sync-count"].as_u64().unwrap_or(0)
}

/// Checks that a migration has not ended.
fn going(now: &Value) -> Result<()> {
    match now["status"].as_str() {
        Some(status @ ("completed" | "failed" | "cancelled")) => Err(format!(
            "the migration has {status} too early: {}",
            now["error-desc"]
        )
        .into()),
        _ => Ok(()),
    }
}
