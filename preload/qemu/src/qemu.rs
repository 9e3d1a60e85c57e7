// SPDX-License-Identifier: MIT OR Apache-2.0
//! The QEMUs of Debian's suites, and one of them that runs.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use crate::lines::{Lines, PATIENCE};
use crate::qmp::Qmp;
use crate::server::Server;
use crate::Result;

/// A version of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V7,
    V10,
    V11,
}

impl Version {
    /// The suite of Debian that has it.
    pub(crate) fn suite(self) -> &'static str {
        match self {
            Version::V7 => "bookworm",
            Version::V10 => "bookworm-backports",
            Version::V11 => "trixie-backports",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Version::V7 => "7.2",
            Version::V10 => "10.0",
            Version::V11 => "11.1",
        }
    }
}

/// Where things are.
pub(crate) struct Places {
    /// Unpacked QEMUs, by suite.
    pub(crate) cache: PathBuf,
    /// The preloaded library.
    pub(crate) library: PathBuf,
    /// The program that serves the sample device.
    pub(crate) server: PathBuf,
}

/// Fetches a QEMU unless the cache has it.
pub(crate) fn fetch(cache: &Path, version: Version) -> Result<()> {
    let suite = version.suite();
    fetch_package(suite, "qemu-system-x86", &cache.join(suite))
}

/// Unpacks a package of a suite of Debian, with all that it needs, unless the folder is there.
pub(crate) fn fetch_package(suite: &str, package: &str, folder: &Path) -> Result<()> {
    if folder.exists() {
        return Ok(());
    }
    println!("fetching {package} from Debian {suite}");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("fetch");
    let status = Command::new(script)
        .args([suite, package])
        .arg(folder)
        .status()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{package} could not be fetched ({status})").into()),
    }
}

/// The command that runs a QEMU, with the library if `preload`, without its own arguments: by
/// the dynamic linker and the libraries of its suite.
pub(crate) fn command(places: &Places, version: Version, preload: bool) -> Result<Command> {
    let root = places.cache.join(version.suite());
    let inside = |path: &str| root.join(path);
    let linkers = [
        "lib64/ld-linux-x86-64.so.2",
        "usr/lib64/ld-linux-x86-64.so.2",
    ];
    let linker = linkers.into_iter().map(inside).find(|path| path.exists());
    let linker = linker.ok_or_else(|| format!("{} has no dynamic linker", root.display()))?;
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(inside);
    let libraries = libraries.map(|path| path.display().to_string()).join(":");
    // If this program is killed, so is QEMU.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(linker);
    command.arg("--library-path").arg(libraries);
    if preload {
        command.arg("--preload").arg(&places.library);
    }
    command.arg(inside("usr/bin/qemu-system-x86_64"));
    for data in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(inside(data));
    }
    command.env("QEMU_MODULE_DIR", inside("usr/lib/x86_64-linux-gnu/qemu"));
    Ok(command)
}

/// What sysfs would say of a device: a folder with the link to its group.
pub(crate) fn sysfs(folder: &Path, group: usize, device: &str) -> Result<PathBuf> {
    let place = folder.join("sys").join(device);
    let groups = folder.join("sys/groups").join(group.to_string());
    fs::create_dir_all(&place)?;
    fs::create_dir_all(&groups)?;
    let link = place.join("iommu_group");
    if !link.exists() {
        symlink(&groups, &link)?;
    }
    Ok(place)
}

/// A QEMU that runs.
pub(crate) struct Qemu {
    pub(crate) name: String,
    folder: PathBuf,
    child: Child,
    qmp: Qmp,
    control: Option<Lines>,
    ended: Option<ExitStatus>,
    /// The process with its device.
    pub(crate) server: Option<Server>,
}

impl Qemu {
    /// Starts `command`, which has all arguments but those for QMP, trace and serial port.
    pub(crate) fn start(mut command: Command, folder: &Path, name: &str) -> Result<Qemu> {
        let file = |what: &str| folder.join(format!("{name}.{what}"));
        let qmp = file("qmp");
        command
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()));
        command
            .arg("-trace")
            .arg("vfio_*")
            .arg("-D")
            .arg(file("qemu-trace"));
        command
            .arg("-serial")
            .arg(format!("file:{}", file("serial").display()));
        command.env("VFIO_PRELOAD_TRACE", file("trace"));
        command.env("VFIO_PRELOAD_CONTROL", file("control"));
        command
            .stdin(Stdio::null())
            .stdout(File::create(file("out"))?);
        command.stderr(File::create(file("err"))?);
        let mut child = command.spawn()?;
        let connected = Qmp::connect(&qmp, || Ok(child.try_wait()?.is_none()));
        let qmp = match connected {
            Ok(qmp) => qmp,
            Err(error) => {
                let _ = child.kill(); // it may have ended
                child.wait()?;
                let said = fs::read_to_string(file("err")).unwrap_or_default();
                return Err(format!("{name} does not start: {error}\n{said}").into());
            }
        };
        Ok(Qemu {
            name: name.to_owned(),
            folder: folder.to_owned(),
            child,
            qmp,
            control: None,
            ended: None,
            server: None,
        })
    }

    fn file(&self, what: &str) -> PathBuf {
        self.folder.join(format!("{}.{what}", self.name))
    }

    pub(crate) fn text(&self, what: &str) -> String {
        let bytes = fs::read(self.file(what)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Runs a command of QMP.
    pub(crate) fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let done = self.qmp.run(command, &arguments);
        done.map_err(|error| format!("{}: {command}: {error}", self.name).into())
    }

    /// Has the library do something.
    pub(crate) fn control(&mut self, line: &str) -> Result<String> {
        if self.control.is_none() {
            self.control = Some(Lines::connect(&self.file("control"))?);
        }
        let lines = self.control.as_mut().ok_or("no control socket")?;
        let answer = lines.ask(line)?;
        match answer.strip_prefix("error: ") {
            Some(error) => Err(format!("{}: {line}: {error}", self.name).into()),
            None => Ok(answer),
        }
    }

    /// Waits until `done` answers something.
    pub(crate) fn wait<T>(
        &mut self,
        what: &str,
        mut done: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(value) = done(self)? {
                return Ok(value);
            }
            if let Some(status) = self.child.try_wait()? {
                self.ended = Some(status);
                return Err(
                    format!("{} has ended ({status}): {}", self.name, self.text("err")).into(),
                );
            }
            if start.elapsed() > PATIENCE {
                return Err(format!("{}: no {what} after {PATIENCE:?}", self.name).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How many rounds of the guest were good, and whether one was bad.
    pub(crate) fn rounds(&self) -> (usize, bool) {
        let serial = self.text("serial");
        (serial.matches("ok ").count(), serial.contains("BAD"))
    }

    /// Waits for `more` rounds of the guest, or for a bad one: returns whether all are good.
    pub(crate) fn wait_rounds(&mut self, more: usize) -> Result<bool> {
        let (before, _) = self.rounds();
        self.wait("round of the guest", |qemu| {
            let (good, bad) = qemu.rounds();
            Ok((bad || good >= before + more).then_some(!bad))
        })
    }

    pub(crate) fn wait_status(&mut self, status: &str) -> Result<()> {
        self.wait(status, |qemu| {
            let now = qemu.run("query-status", json!({}))?;
            Ok((now["status"] == status).then_some(()))
        })
    }

    /// How many events of this name have come.
    pub(crate) fn events(&self, name: &str) -> usize {
        self.qmp
            .events
            .iter()
            .filter(|event| *event == name)
            .count()
    }

    /// Reads `size` bytes of guest memory at `addr`.
    pub(crate) fn memory(&mut self, addr: u64, size: u64) -> Result<Vec<u8>> {
        let file = self.file("memory");
        self.run(
            "pmemsave",
            json!({"val": addr, "size": size, "filename": file}),
        )?;
        let memory = fs::read(&file)?;
        fs::remove_file(&file)?;
        Ok(memory)
    }

    /// Waits until it ends by itself.
    pub(crate) fn wait_end(&mut self) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.ended {
                return Ok(status);
            }
            self.ended = self.child.try_wait()?;
            if self.ended.is_none() && start.elapsed() > PATIENCE {
                return Err(format!("{} does not end", self.name).into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it ends, or ends it if it stays: after a migration that did not arrive.
    pub(crate) fn wait_end_or_quit(&mut self) -> Result<()> {
        let start = Instant::now();
        while self.ended.is_none() && start.elapsed() < Duration::from_secs(2) {
            self.ended = self.child.try_wait()?;
            std::thread::sleep(Duration::from_millis(10));
        }
        self.quit()
    }

    /// Ends it.
    pub(crate) fn quit(&mut self) -> Result<()> {
        if self.ended.is_none() {
            let _ = self.qmp.run("quit", &json!({})); // it may end before it answers
            let status = self.wait_end()?;
            if !status.success() {
                return Err(
                    format!("{} ended with {status}: {}", self.name, self.text("err")).into(),
                );
            }
        }
        Ok(())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill(); // it may have ended
            let _ = self.child.wait();
        }
    }
}
