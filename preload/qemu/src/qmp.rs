// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's machine protocol.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{json, Value};

use crate::lines::{Lines, PATIENCE};
use crate::Result;

pub(crate) struct Qmp {
    lines: Lines,
    /// The names of events that came meanwhile.
    pub(crate) events: Vec<String>,
}

impl Qmp {
    /// Connects as soon as QEMU listens, while `alive` says that it runs.
    pub(crate) fn connect(path: &Path, mut alive: impl FnMut() -> Result<bool>) -> Result<Qmp> {
        let start = Instant::now();
        let lines = loop {
            match Lines::connect(path) {
                Ok(lines) => break lines,
                Err(_) if alive()? && start.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return Err(error),
            }
        };
        let events = Vec::new();
        let mut qmp = Qmp { lines, events };
        qmp.lines.receive()?; // the greeting
        qmp.run("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    pub(crate) fn run(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.lines.send(&request.to_string())?;
        loop {
            let mut answer: Value = serde_json::from_str(&self.lines.receive()?)?;
            if let Some(event) = answer["event"].as_str() {
                self.events.push(event.to_owned());
            } else if let Some(error) = answer["error"]["desc"].as_str() {
                return Err(error.to_owned().into());
            } else {
                return Ok(answer["return"].take());
            }
        }
    }
}
