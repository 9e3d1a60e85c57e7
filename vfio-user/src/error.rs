// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a message was refused, and what its receiver does then.

use core::fmt;

/// What the receiver of a refused message does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Answer with [`Error::errno`] and go on. A command that wants no reply gets none.
    Answer,
    /// Answer with [`Error::errno`], even if the command wants no reply, and close the
    /// connection.
    AnswerAndClose,
    /// Close the connection without an answer.
    Close,
}

macro_rules! errors {
    ($($name:ident => $errno:ident $verdict:ident, $text:literal;)*) => {
        /// Why a message was refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Error {
            $(#[doc = $text] #[doc = ""] #[doc = concat!("`", stringify!($errno), "`")] $name,)*
        }

        impl Error {
            /// Every cause.
            pub const ALL: &'static [Error] = &[$(Error::$name,)*];

            /// The error number that the reply's header gets.
            #[must_use]
            pub const fn errno(self) -> u32 {
                match self { $(Error::$name => $errno,)* }
            }

            /// What the receiver does.
            #[must_use]
            pub const fn verdict(self) -> Verdict {
                match self { $(Error::$name => Verdict::$verdict,)* }
            }
        }

        impl fmt::Display for Error {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Error::$name => $text,)* })
            }
        }
    };
}

const E2BIG: u32 = 7;
/// The number that stands for an error reply without a usable number.
pub(crate) const EINVAL: u32 = 22;
const EPROTO: u32 = 71;

errors! {
    MessageTooShort => EINVAL Close, "the message's size is smaller than its header";
    MessageTooLong => EINVAL Close, "the message is larger than this side takes";
    MessageType => EINVAL Close, "the message is neither a command nor a reply";
    NotNegotiated => EINVAL AnswerAndClose, "the first message must be the command VERSION";
    Major => EINVAL AnswerAndClose, "the major version is not 0";
    NoTerminator => EINVAL AnswerAndClose, "the version data do not end with NUL";
    Json => EINVAL AnswerAndClose, "the version data are no JSON object";
    Capability => EINVAL AnswerAndClose, "a capability has a value of the wrong type or range";
    NoPageSize => EINVAL AnswerAndClose, "the two sides have no page size in common";
    VersionDescriptors => EINVAL AnswerAndClose, "the command VERSION takes no file descriptors";
    ShortVersion => EINVAL AnswerAndClose, "the version message is smaller than its structure";
    NegotiatedTwice => EINVAL Answer, "VERSION was agreed already";
    UnknownCommand => EINVAL Answer, "the command is unknown, or this side does not take it";
    ShortPayload => EINVAL Answer, "the payload is smaller than its structure";
    ShortArgsz => EINVAL Answer, "argsz is smaller than the structure and its data";
    LongArgsz => EINVAL Answer, "argsz is larger than one transfer may be";
    UnknownFlags => EINVAL Answer, "a flag is unknown";
    FlagCombination => EINVAL Answer, "these flags do not go together";
    NotZero => EINVAL Answer, "a field that must be zero is not";
    CountMismatch => EINVAL Answer, "the count does not fit the size of the payload";
    TransferTooLong => EINVAL Answer, "the count is larger than max_data_xfer_size";
    DmaTooLong => E2BIG Answer, "the count of a DMA message is larger than its data or max_data_xfer_size";
    NoDescriptor => EINVAL Answer, "the flags need a file descriptor";
    Descriptors => EINVAL Answer, "the number of file descriptors does not fit the message";
    IrqRange => EINVAL Answer, "the range of interrupts wraps around, or an empty one does not start at 0";
    UnknownFeature => EINVAL Answer, "the feature is unknown, or does not have this operation";
    PageSize => EINVAL Answer, "the page size is not a power of two";
    ZeroLength => EINVAL Answer, "the length is zero";
    BitmapTooLong => E2BIG Answer, "the bitmap is larger than max_data_xfer_size";
    UnexpectedMessage => EPROTO Close, "this message cannot come at this point";
    BadReply => EPROTO Close, "the reply does not have the form of its command";
    WrongReply => EPROTO Close, "the reply does not belong to the request";
    Minor => EPROTO Close, "the server answered with a higher minor version";
    TwinSocket => EPROTO Close, "the server's twin_socket names no file descriptor, or was not asked for";
}

impl core::error::Error for Error {}

/// A message, or its data, does not fit into the caller's buffer or into the
/// protocol's 32-bit fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the message does not fit into the buffer")
    }
}

impl core::error::Error for NoRoom {}
