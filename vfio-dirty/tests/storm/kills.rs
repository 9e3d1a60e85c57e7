// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process is killed at a random moment of a migration. The VMM then says that the migration
//! has failed, unless it was complete, and a server has room for its next client.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use adapter_user::vfio_user::{Client, ClientOptions, DmaMemory};
use adapter_user::Errno;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::registers::SEQUENCE;
use crate::vmm::{migrate, Failure, Plan};
use crate::{servers, Server, HANGS};

/// The first argument of the VMM's process.
pub(crate) const VMM: &str = "storm-vmm";
/// What the VMM's process ends with, if the migration failed and it says so.
const FAILED: u8 = 4;
/// If pages are stale. A panic has another number.
const STALE: u8 = 3;

/// Runs the VMM's process.
pub(crate) fn vmm(source: &str, destination: &str, memory: &str, seed: &str) -> ExitCode {
    let (Ok(memory), Ok(seed)) = (memory.parse(), seed.parse()) else {
        return ExitCode::from(crate::USAGE);
    };
    let plan = Plan {
        memory,
        logs: true,
        remaps: seed % 2 == 0,
        messages: false,
    };
    let watch = |clients: [Client; 2]| {
        thread::spawn(move || loop {
            if let Some(cause) = clients.iter().find_map(Client::ended) {
                println!("{cause}");
                return;
            }
            thread::sleep(Duration::from_millis(2));
        });
    };
    match migrate(source, destination, &plan, seed, watch) {
        Ok(outcome) if outcome.stale == 0 => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(STALE),
        Err(_) => ExitCode::from(FAILED),
    }
}

#[derive(Clone, Copy, Debug)]
enum Victim {
    Source,
    Destination,
    Vmm,
}

/// Kills a process `kills` times, each at some moment of a migration, which takes `time` at most.
pub(crate) fn run(kills: u32, memory: u64, time: Duration) -> Result<(), Failure> {
    let mut random = SmallRng::seed_from_u64(1);
    let (mut longest, mut complete) = (Duration::ZERO, 0);
    for number in 0..kills {
        let victim = [Victim::Source, Victim::Destination, Victim::Vmm][number as usize % 3];
        let place = tempfile::tempdir()?;
        let (mut source, mut destination) = servers(place.path())?;
        let mut vmm = Running(
            Command::new(std::env::current_exe()?)
                .args([VMM, source.path(), destination.path()])
                .args([memory.to_string(), number.to_string()])
                .stdout(Stdio::piped())
                .spawn()?,
        );
        let said = vmm.0.stdout.take().ok_or("no output")?;
        thread::sleep(time.mul_f64(random.random()));
        let killed = match victim {
            Victim::Source => &mut source.process,
            Victim::Destination => &mut destination.process,
            Victim::Vmm => &mut vmm.0,
        };
        killed.kill()?;
        let since = Instant::now();
        killed.wait()?;
        match victim {
            Victim::Vmm => {
                next_client(&source)?;
                next_client(&destination)?;
                longest = longest.max(since.elapsed());
            }
            Victim::Source | Victim::Destination => {
                // The connection's end, or that of the process, if the migration was complete.
                let mut line = String::new();
                BufReader::new(said).read_line(&mut line)?;
                longest = longest.max(since.elapsed());
                let status = vmm.end(since)?;
                match status.code() {
                    Some(0) => complete += 1,
                    Some(code) if code == i32::from(FAILED) => {}
                    _ => return Err(format!("{victim:?} was killed, and the VMM {status}").into()),
                }
            }
        }
    }
    println!(
        "{kills} processes killed: the others knew it after at most {} ms; {complete} of the \
         migrations were complete before, and the others failed and said so",
        longest.as_millis()
    );
    Ok(())
}

/// The VMM's process, which ends with this value.
struct Running(Child);

impl Running {
    /// Waits until it ends by itself.
    fn end(&mut self, since: Instant) -> Result<ExitStatus, Failure> {
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            if since.elapsed() > HANGS {
                return Err("a server was killed, and the VMM hangs".into());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// No memory.
struct Nothing;

impl DmaMemory for Nothing {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }
}

/// Waits until the server has taken another client, whose device is a new one.
fn next_client(server: &Server) -> Result<(), Failure> {
    let socket = UnixStream::connect(&server.path)?;
    let options = ClientOptions {
        deadline: HANGS,
        ..ClientOptions::default()
    };
    let client = Client::connect(socket, Arc::new(Nothing), options)?;
    let mut sequence = [1; 8];
    client.read_region(0, SEQUENCE, &mut sequence)?;
    if sequence != [0; 8] {
        return Err("the next client's device is not as at first".into());
    }
    Ok(())
}
