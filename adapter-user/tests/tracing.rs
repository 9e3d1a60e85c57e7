// SPDX-License-Identifier: MIT OR Apache-2.0
//! Spans of takes, and events for what is told as dirty as a whole.

use std::fmt;
use std::sync::{Arc, Mutex};

use adapter_user::guest::{DirtyIovas, IovaRange, Report, SourceError, Tracker};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Writes a line for what happens, indented by the spans that it is in.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    spans: Vec<String>,
    depth: usize,
    lines: Vec<String>,
}

/// The fields of a span or an event.
struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0 += &match field.name() {
            "message" => format!(" {value:?}"),
            name => format!(" {name}={value:?}"),
        };
    }
}

impl State {
    fn line(&mut self, text: &str) {
        let line = format!("{}{text}", "  ".repeat(self.depth));
        self.lines.push(line);
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("adapter_user")
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = Fields(span.metadata().name().to_owned());
        span.record(&mut fields);
        let mut state = self.0.lock().unwrap();
        state.spans.push(fields.0);
        Id::from_u64(state.spans.len() as u64)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(event.metadata().level().to_string());
        event.record(&mut fields);
        self.0.lock().unwrap().line(&fields.0);
    }

    fn enter(&self, id: &Id) {
        let mut state = self.0.lock().unwrap();
        let name = state.spans[id.into_u64() as usize - 1].clone();
        state.line(&name);
        state.depth += 1;
    }

    fn exit(&self, _: &Id) {
        self.0.lock().unwrap().depth -= 1;
    }
}

#[test]
fn a_take_has_spans_and_says_why_all_is_dirty() {
    let lines = Lines::default();
    tracing::subscriber::with_default(lines.clone(), || {
        let tracker = Tracker::new(None);
        tracker.add_slot(0, 0, None, 1 << 20).unwrap();
        tracker.start().unwrap();
        tracker.add_slot(1, 1 << 20, None, 4096).unwrap();
        tracker.add_source("kvm", |report| Ok(report.or_ring([(0, 1), (0, 2)])?));
        let view = tracker.iova_view();
        view.map(0, 0, 0x3000).unwrap();
        let log = |_: &[IovaRange], _: &mut DirtyIovas| Err(SourceError::from("unplugged"));
        tracker.add_log("nvme0", &view, 0, log).unwrap();
        tracker.take(&mut Report::new()).unwrap_err();
    });
    let wanted = [
        "WARN wholly dirty why=\"new_memory\" bytes=4096 what=slot 1: a slot is added",
        "take",
        "  source name=\"kvm\"",
        "    DEBUG told bytes=8192",
        "  source name=\"nvme0\"",
        "    WARN wholly dirty why=\"log_failed\" bytes=12288 what=unplugged",
        "    DEBUG told bytes=0",
    ];
    assert_eq!(lines.0.lock().unwrap().lines, wanted);
}
