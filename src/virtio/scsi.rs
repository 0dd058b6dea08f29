//! virtio-scsi on the wire (virtio 1.2, 5.6): requests of the request queues and of the control queue, taken off their
//! chains, and their responses.
//!
//! Promises that a request is copied once (I6) however it was framed, and that its response has a place before anything
//! is done for it. Knows nothing of commands or sense data: a CDB is bytes here. The data of a request stays in the chain.
//! Start at [`parse`].

use super::chain::{Chain, SoleExchange};
use super::memory::{AnswerPlace, Segment};

/// Response codes (virtio 1.2, 5.6.6.1.1 and 5.6.6.2). FUNCTION COMPLETE of task management is OK, too.
pub mod response {
    /// The status and the sense data say how the command ended.
    pub const OK: u8 = 0;
    /// The command needs more data than the request has buffers for.
    pub const OVERRUN: u8 = 1;
    /// It was ended by task management.
    pub const ABORTED: u8 = 2;
    /// There is no such target.
    pub const BAD_TARGET: u8 = 3;
    /// It was ended by a reset.
    pub const RESET: u8 = 4;
    /// Something else is wrong with the request.
    pub const FAILURE: u8 = 9;
    /// FUNCTION SUCCEEDED: the command that was asked for is there.
    pub const FUNCTION_SUCCEEDED: u8 = 10;
    /// The device does not do this.
    pub const FUNCTION_REJECTED: u8 = 11;
    /// The target has no such logical unit.
    pub const INCORRECT_LUN: u8 = 12;
}

/// Task management functions (virtio 1.2, 5.6.6.2).
pub mod task {
    /// One command.
    pub const ABORT_TASK: u32 = 0;
    /// All commands of this initiator for a logical unit.
    pub const ABORT_TASK_SET: u32 = 1;
    /// Ends an auto contingent allegiance.
    pub const CLEAR_ACA: u32 = 2;
    /// All commands for a logical unit.
    pub const CLEAR_TASK_SET: u32 = 3;
    /// All commands of this initiator for a target.
    pub const I_T_NEXUS_RESET: u32 = 4;
    /// All commands for a logical unit, and what it remembers.
    pub const LOGICAL_UNIT_RESET: u32 = 5;
    /// Whether a command is there.
    pub const QUERY_TASK: u32 = 6;
    /// Whether any command is there.
    pub const QUERY_TASK_SET: u32 = 7;
}

/// Events, reasons, and feature bits that let them be sent (virtio 1.2, 5.6.3 and 5.6.6.3).
pub mod event {
    /// VIRTIO_SCSI_F_HOTPLUG: logical units appear and disappear.
    pub const F_HOTPLUG: u64 = 1 << 1;
    /// VIRTIO_SCSI_F_CHANGE: parameters of logical units change.
    pub const F_CHANGE: u64 = 1 << 2;
    /// Nothing; the buffer carries [`EVENTS_MISSED`].
    pub const NO_EVENT: u32 = 0;
    /// A logical unit was reset, has appeared or has disappeared.
    pub const TRANSPORT_RESET: u32 = 1;
    /// A parameter has changed: the reason is its ASC, and its ASCQ in the second byte.
    pub const PARAM_CHANGE: u32 = 3;
    /// Events before this one were dropped.
    pub const EVENTS_MISSED: u32 = 1 << 31;
    /// Of a reset: the logical unit was reset, and is still there.
    pub const RESET_HARD: u32 = 0;
    /// Of a reset: the logical unit has appeared.
    pub const RESET_RESCAN: u32 = 1;
    /// The logical unit has disappeared.
    pub const RESET_REMOVED: u32 = 2;
}

/// Bytes of an event.
const EVENT_BYTES: u32 = 16;

const TYPE_TASK_MANAGEMENT: u32 = 0;
const TYPE_NOTIFICATION_QUERY: u32 = 1;
const TYPE_NOTIFICATION_SUBSCRIBE: u32 = 2;

/// Bytes of a request before its CDB: LUN, id, task attribute, priority, CRN.
const HEADER_BYTES: usize = 19;
/// Bytes of a response before its sense data.
const RESPONSE_BYTES: u32 = 12;
/// Bytes of a CDB and of sense data unless a driver changes them.
const DEFAULT_CDB: u32 = 32;
const DEFAULT_SENSE: u32 = 96;
/// Bytes of a whole request of such sizes.
pub const SHORT_REQUEST_BYTES: usize = HEADER_BYTES + DEFAULT_CDB as usize;
/// Bytes of a whole response.
pub const SHORT_RESPONSE_BYTES: usize = (RESPONSE_BYTES + DEFAULT_SENSE) as usize;
/// The most that a CDB or sense data may have.
const MAX_SIZE: u32 = 256;
/// Pieces that a response may lie in: enough for any driver, since they put it into one.
const MAX_PIECES: usize = 8;

/// What the configuration space says of the fields of a request; a driver may change both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    cdb: u32,
    sense: u32,
}

impl Sizes {
    /// What they are unless a driver changes them.
    pub const DEFAULT: Sizes = Sizes {
        cdb: DEFAULT_CDB,
        sense: DEFAULT_SENSE,
    };

    /// `None` for sizes beyond 256 bytes, or no CDB.
    #[must_use]
    pub const fn new(cdb: u32, sense: u32) -> Option<Sizes> {
        if cdb >= 1 && cdb <= MAX_SIZE && sense <= MAX_SIZE {
            Some(Sizes { cdb, sense })
        } else {
            None
        }
    }
}

/// Where a response goes: writable bytes of guest memory, in pieces. Lives as long as a [`Segment`] does.
#[derive(Debug, Clone, Copy)]
pub struct ResponsePlace {
    pieces: [Segment; MAX_PIECES],
    count: u8,
    len: u16,
}

impl ResponsePlace {
    /// Takes the first `len` writable bytes off; `None` if there are not as many, or in too many pieces.
    fn take(chain: &mut Chain, len: u32) -> Option<ResponsePlace> {
        let mut pieces = [Segment::EMPTY; MAX_PIECES];
        let count = chain.take_writable(len, &mut pieces)?;
        Some(ResponsePlace {
            pieces,
            count: u8::try_from(count).ok()?,
            len: u16::try_from(len).ok()?,
        })
    }

    /// In one piece.
    pub fn whole(segment: Segment) -> ResponsePlace {
        let mut pieces = [Segment::EMPTY; MAX_PIECES];
        pieces[0] = segment;
        ResponsePlace {
            pieces,
            count: 1,
            len: u16::try_from(segment.len()).unwrap_or(u16::MAX),
        }
    }

    fn write(&self, bytes: &[u8]) {
        let mut rest = bytes;
        for piece in &self.pieces[..usize::from(self.count)] {
            let copied = piece.copy_from(rest);
            rest = &rest[copied..];
        }
    }
}

/// A command, copied. Its data is what is left in the chain: `readable()` for the device, `writable()` from it.
#[derive(Debug, Clone, Copy)]
pub struct ScsiRequest {
    /// The 8 bytes that address a logical unit.
    pub lun: [u8; 8],
    /// Its name for task management, the initiator's choice.
    pub id: u64,
    cdb: [u8; MAX_SIZE as usize],
    cdb_len: u16,
    /// Where to answer.
    pub place: ResponsePlace,
}

impl ScsiRequest {
    /// The CDB, as long as the configuration space says. `None` of a request that is too short.
    #[must_use]
    pub fn cdb(&self) -> Option<&[u8]> {
        let cdb = &self.cdb[..usize::from(self.cdb_len)];
        (!cdb.is_empty()).then_some(cdb)
    }
}

/// Takes a command and the place of its response off the chain just popped. `None` if there is no place for an answer: its
/// head goes back with nothing written.
pub fn parse(chain: &mut Chain, sizes: Sizes) -> Option<ScsiRequest> {
    // A faulty chain shows nothing.
    let place = ResponsePlace::take(chain, RESPONSE_BYTES + sizes.sense)?;
    let mut request = ScsiRequest {
        lun: [0; 8],
        id: 0,
        cdb: [0; MAX_SIZE as usize],
        cdb_len: 0,
        place,
    };
    let mut bytes = [0; HEADER_BYTES + MAX_SIZE as usize];
    if chain.take_readable(&mut bytes[..HEADER_BYTES + sizes.cdb as usize]) {
        // Attribute, priority and CRN order commands, of which each is carried out as it comes.
        let [lun, id] = [0, 8].map(|at| std::array::from_fn(|byte| bytes[at + byte]));
        (request.lun, request.id) = (lun, u64::from_le_bytes(id));
        request.cdb.copy_from_slice(&bytes[HEADER_BYTES..]);
        // At most 256.
        request.cdb_len = u16::try_from(sizes.cdb).unwrap_or(0);
    }
    Some(request)
}

/// A request that was taken off the ring in short.
pub type ShortExchange = SoleExchange<SHORT_REQUEST_BYTES, SHORT_RESPONSE_BYTES>;

/// Its place of an answer.
pub type ShortResponse = AnswerPlace<SHORT_RESPONSE_BYTES>;

/// [`parse`] of it: what addresses a logical unit, and the first 16 bytes of the CDB. Once (I6).
#[inline(always)]
#[must_use]
pub fn parse_short(exchange: &ShortExchange) -> ([u8; 8], [[u8; 8]; 2]) {
    let header = &exchange.header;
    let cdb = [
        header.read::<HEADER_BYTES>(),
        header.read::<{ HEADER_BYTES + 8 }>(),
    ];
    (header.read::<0>(), cdb)
}

/// The guest's name for it. Once, too.
#[inline(always)]
#[must_use]
pub fn id_of_short(exchange: &ShortExchange) -> u64 {
    u64::from_le_bytes(exchange.header.read::<8>())
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ending<'a> {
    /// One of [`response`].
    pub response: u8,
    /// A SCSI status.
    pub status: u8,
    /// Sense data; cut to what the response has room for.
    pub sense: &'a [u8],
    /// Bytes of the request's data buffers that were not used.
    pub residual: u32,
    /// Bytes of data that the guest gets.
    pub data_in: u32,
}

/// Ends a command: writes its response, all of it, and returns the used length for its head.
pub fn finish(place: &ResponsePlace, ending: &Ending<'_>) -> u32 {
    let room = place.len.saturating_sub(12);
    let len = ending.sense.len().min(room.into());
    let mut bytes = [0; 12 + MAX_SIZE as usize];
    // No more than 256.
    bytes[..4].copy_from_slice(&u32::try_from(len).unwrap_or(0).to_le_bytes());
    bytes[4..8].copy_from_slice(&ending.residual.to_le_bytes());
    bytes[10] = ending.status;
    bytes[11] = ending.response;
    bytes[12..12 + len].copy_from_slice(&ending.sense[..len]);
    place.write(&bytes[..usize::from(place.len)]);
    // Chains hold fewer than 2^32 bytes, the response included.
    u32::from(place.len).wrapping_add(ending.data_in)
}

/// [`finish`] of one that ended with GOOD, and with all its data moved.
#[inline(always)]
pub fn finish_short(place: ShortResponse, data_in: u32) -> u32 {
    // GOOD, OK, no residual and no sense data are zeroes.
    place.fill(&[0; SHORT_RESPONSE_BYTES]);
    // As there.
    (RESPONSE_BYTES + DEFAULT_SENSE).wrapping_add(data_in)
}

/// What the control queue carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// A task management function.
    Task {
        /// One of [`task`], or unknown.
        function: u32,
        /// Whose.
        lun: [u8; 8],
        /// The command's name, if it is about one.
        id: u64,
    },
    /// A query of, or a subscription to, asynchronous notifications.
    Notification {
        /// Of what.
        lun: [u8; 8],
    },
}

/// Takes a control request and the place of its response off the chain just popped. `None` for anything else: its head goes
/// back with nothing written.
pub fn parse_control(chain: &mut Chain) -> Option<(Control, ResponsePlace)> {
    let mut word = [0; 4];
    let mut lun = [0; 8];
    let mut number = || {
        chain
            .take_readable(&mut word)
            .then_some(u32::from_le_bytes(word))
    };
    match number()? {
        TYPE_TASK_MANAGEMENT => {
            let function = number()?;
            let mut id = [0; 8];
            if !chain.take_readable(&mut lun) || !chain.take_readable(&mut id) {
                return None;
            }
            let place = ResponsePlace::take(chain, 1)?;
            let id = u64::from_le_bytes(id);
            Some((Control::Task { function, lun, id }, place))
        }
        TYPE_NOTIFICATION_QUERY | TYPE_NOTIFICATION_SUBSCRIBE => {
            // The events that are asked for follow.
            if !chain.take_readable(&mut lun) || !chain.take_readable(&mut word) {
                return None;
            }
            let place = ResponsePlace::take(chain, 5)?;
            Some((Control::Notification { lun }, place))
        }
        _ => None,
    }
}

/// Ends a control request: writes its response, and returns the used length for its head. There are no asynchronous
/// notifications, so none of those that were asked for will come.
pub fn finish_control(place: &ResponsePlace, response: u8) -> u32 {
    let bytes = [0, 0, 0, 0, response];
    place.write(&bytes[bytes.len() - usize::from(place.len).min(5)..]);
    place.len.into()
}

/// Takes the place of an event off the chain just popped; `None` if there is not enough of it.
pub fn parse_event(chain: &mut Chain) -> Option<ResponsePlace> {
    ResponsePlace::take(chain, EVENT_BYTES)
}

/// Writes an event, and returns the used length for its head.
pub fn finish_event(place: &ResponsePlace, event: u32, lun: [u8; 8], reason: u32) -> u32 {
    let mut bytes = [0; EVENT_BYTES as usize];
    bytes[..4].copy_from_slice(&event.to_le_bytes());
    bytes[4..12].copy_from_slice(&lun);
    bytes[12..].copy_from_slice(&reason.to_le_bytes());
    place.write(&bytes);
    EVENT_BYTES
}
