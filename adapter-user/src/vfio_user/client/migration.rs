// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's state, as the migration of VFIO moves it.

use dirty_core::migration::{Features, State};
use vfio_user_wire::wire::{
    FeatureHead, LoggingControl, LoggingReport, MigState, FEATURE_GET, FEATURE_MASK, FEATURE_PROBE,
    FEATURE_SET,
};
use vfio_user_wire::{Feature, FeatureAnswer, FeatureCall, Reply, Request};

use super::{Client, ClientError};

/// Room for the data of a feature without ranges.
const DATA: usize = if LoggingReport::SIZE > LoggingControl::SIZE {
    LoggingReport::SIZE
} else {
    LoggingControl::SIZE
};

impl Client {
    /// Sends a DEVICE_FEATURE. `read` gets the answer.
    pub(super) fn feature<R>(
        &self,
        call: &FeatureCall<'_>,
        read: impl FnOnce(FeatureAnswer<'_>) -> Option<R>,
    ) -> Result<R, ClientError> {
        let ranges = match call {
            FeatureCall::StartLogging { ranges, .. } => ranges.len(),
            _ => 0,
        };
        let mut buffer = vec![0; ranges.saturating_mul(16).saturating_add(DATA)];
        let feature = call.request(&mut buffer);
        let feature = feature.map_err(|_| ClientError::Argument("the message is too large"))?;
        let request = Request::Feature(feature);
        self.link().call(&request, &[], |reply, _| match reply {
            Reply::Feature(reply) => reply.answer(&feature).ok().and_then(read),
            _ => None,
        })
    }

    /// Returns whether the server has a feature of DEVICE_FEATURE: its number, with
    /// `VFIO_DEVICE_FEATURE_GET` or `_SET` if that is asked too.
    ///
    /// # Errors
    ///
    /// Those that end the connection. A refusal is the answer no.
    pub fn probe(&self, feature: u32) -> Result<bool, ClientError> {
        let request = Request::Feature(Feature {
            argsz: FeatureHead::SIZE as u32,
            flags: feature & (FEATURE_MASK | FEATURE_GET | FEATURE_SET) | FEATURE_PROBE,
            data: &[],
        });
        match self.link().call(&request, &[], |_, _| Some(())) {
            Ok(()) => Ok(true),
            Err(ClientError::Refused(..)) => Ok(false),
            Err(cause) => Err(cause),
        }
    }

    /// Returns which states the device has beside those that each has.
    ///
    /// # Errors
    ///
    /// As every call of a [`Client`]. A device that does not migrate is
    /// [`ClientError::Refused`].
    pub fn migration_features(&self) -> Result<Features, ClientError> {
        self.feature(&FeatureCall::GetMigration, |answer| match answer {
            // Bits that are not known here are states that nobody asks for.
            FeatureAnswer::Migration(bits) => Features::from_bits(bits & ALL_FEATURES),
            _ => None,
        })
    }

    /// Returns the device's state.
    ///
    /// # Errors
    ///
    /// As every call of a [`Client`].
    pub fn state(&self) -> Result<State, ClientError> {
        self.feature(&FeatureCall::GetState, |answer| match answer {
            FeatureAnswer::State(state) => State::from_raw(state.device_state),
            _ => None,
        })
    }

    /// Takes the device to another state, by way of those between.
    ///
    /// # Errors
    ///
    /// As every call of a [`Client`]. After [`ClientError::Refused`] the device is in the
    /// state before, in one on the way, or in ERROR: ask for its [`state`](Client::state).
    pub fn set_state(&self, state: State) -> Result<(), ClientError> {
        let state = MigState {
            device_state: state.raw(),
            data_fd: u32::MAX,
        };
        self.feature(&FeatureCall::SetState(state), |_| Some(()))
    }

    /// Reads the next bytes of the device's state, in PRE_COPY or STOP_COPY. Returns how many
    /// bytes of `data` there are: fewer than all of them at the end of the state, or of what
    /// there is of it in PRE_COPY.
    ///
    /// # Errors
    ///
    /// As every call of a [`Client`]. What was read before is lost then, so that the migration
    /// must begin again.
    pub fn read_state(&self, data: &mut [u8]) -> Result<usize, ClientError> {
        let mut done = 0;
        for part in data.chunks_mut(self.max_data()) {
            let size = part.len() as u32; // at most max_data_xfer_size
            let request = Request::MigDataRead { size };
            let read = self.link().call(&request, &[], |reply, _| match reply {
                Reply::MigDataRead(bytes) => {
                    part.get_mut(..bytes.len())?.copy_from_slice(bytes);
                    Some(bytes.len())
                }
                _ => None,
            })?;
            done += read;
            if read < part.len() {
                break;
            }
        }
        Ok(done)
    }

    /// Writes the next bytes of a state, in RESUMING. The device takes it when it leaves that
    /// state, and may refuse it then.
    ///
    /// # Errors
    ///
    /// As every call of a [`Client`].
    pub fn write_state(&self, data: &[u8]) -> Result<(), ClientError> {
        data.chunks(self.max_data()).try_for_each(|part| {
            let request = Request::MigDataWrite(part);
            self.link().call(&request, &[], |_, _| Some(()))
        })
    }
}

const ALL_FEATURES: u64 = Features {
    p2p: true,
    pre_copy: true,
}
.bits();
