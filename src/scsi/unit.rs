//! Logical units: what they are, and which initiators share them.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use super::attention::{Attention, Conditions};
use super::initiator::Initiator;
use super::{Health, RangeLock};
use crate::block::Geometry;

/// What a namespace says of its identity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnitIds {
    /// 8 bytes.
    pub eui64: Option<[u8; 8]>,
    /// 16 bytes, EUI-64 based.
    pub nguid: Option<[u8; 16]>,
    /// RFC 4122.
    pub uuid: Option<[u8; 16]>,
}

/// The most initiators that share a logical unit: sockets whose hosts have it.
pub const MAX_INITIATORS: usize = 64;

/// A disk, as its initiators see it. A clone is the same logical unit: what happens to one happens to the other.
#[derive(Clone, Debug)]
pub struct LogicalUnit {
    geometry: Geometry,
    serial: String,
    ids: UnitIds,
    volatile_cache: bool,
    unmap: bool,
    write_zeroes: bool,
    unmapped_reads_zero: bool,
    health: Arc<Health>,
    shared: Arc<Shared>,
}

/// Request queues of a logical unit that nobody has said the number of.
const DEFAULT_LANES: usize = 64;

/// What an initiator may change about a logical unit, for all of them. All of it is off when the server starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Modes {
    /// WCE = 0, of a disk with a volatile cache.
    pub(super) write_through: bool,
    /// D_SENSE.
    pub(super) descriptor_sense: bool,
    /// SWP.
    pub(super) write_protected: bool,
}

impl Modes {
    fn from_bits(bits: u8) -> Modes {
        Modes {
            write_through: bits & 1 != 0,
            descriptor_sense: bits & 2 != 0,
            write_protected: bits & 4 != 0,
        }
    }

    fn to_bits(self) -> u8 {
        u8::from(self.write_through)
            | u8::from(self.descriptor_sense) << 1
            | u8::from(self.write_protected) << 2
    }
}

/// What all hosts that have a logical unit share of it.
#[derive(Debug)]
struct Shared {
    lock: RangeLock,
    /// See [`Modes::to_bits`].
    modes: AtomicU8,
    /// Filled from the front, and never emptied: initiators are those that the server was started with.
    sharers: [OnceLock<Sharer>; MAX_INITIATORS],
}

impl Shared {
    fn new(lanes: usize) -> Arc<Shared> {
        Arc::new(Shared {
            lock: RangeLock::new(lanes),
            modes: AtomicU8::new(0),
            sharers: [const { OnceLock::new() }; MAX_INITIATORS],
        })
    }
}

/// An initiator of a logical unit: their I_T_L nexus, connected or not.
#[derive(Debug)]
struct Sharer {
    initiator: Initiator,
    conditions: Arc<Conditions>,
}

/// Why an initiator cannot have a logical unit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// Reservations could not tell the two apart.
    #[error(
        "initiator {0} has this logical unit already: give each socket a name of its own with initiator=..."
    )]
    Taken(Initiator),
    /// There is no room.
    #[error("more than {MAX_INITIATORS} initiators share this logical unit")]
    Full,
}

impl LogicalUnit {
    /// A disk with `serial`, ASCII, and nothing more: no cache, no UNMAP.
    ///
    /// # Panics
    /// When it has no blocks: there is no last one.
    #[must_use]
    pub fn new(geometry: Geometry, serial: &str) -> LogicalUnit {
        assert!(geometry.blocks() > 0, "a disk has blocks");
        LogicalUnit {
            geometry,
            serial: serial.to_owned(),
            ids: UnitIds::default(),
            volatile_cache: false,
            unmap: false,
            write_zeroes: false,
            unmapped_reads_zero: false,
            health: Arc::default(),
            shared: Shared::new(DEFAULT_LANES),
        }
    }

    /// What it is called.
    #[must_use]
    pub fn with_ids(self, ids: UnitIds) -> LogicalUnit {
        LogicalUnit { ids, ..self }
    }

    /// For as many request queues, those of all hosts together; to be said before anybody shares it.
    #[must_use]
    pub fn with_lanes(self, lanes: usize) -> LogicalUnit {
        LogicalUnit {
            shared: Shared::new(lanes),
            ..self
        }
    }

    /// Where its device's health is told.
    #[must_use]
    pub fn with_health(self, health: Arc<Health>) -> LogicalUnit {
        LogicalUnit { health, ..self }
    }

    /// Writes may be lost before they are synchronized.
    #[must_use]
    pub fn with_volatile_cache(self, volatile_cache: bool) -> LogicalUnit {
        LogicalUnit {
            volatile_cache,
            ..self
        }
    }

    /// Blocks can be given back, and are zeroes then if `reads_zero`; zeroes can be written without sending any.
    #[must_use]
    pub fn with_provisioning(
        self,
        unmap: bool,
        reads_zero: bool,
        write_zeroes: bool,
    ) -> LogicalUnit {
        LogicalUnit {
            unmap,
            unmapped_reads_zero: unmap && reads_zero,
            write_zeroes,
            ..self
        }
    }

    /// Where COMPARE AND WRITE holds up other writes. Seats are request queues.
    #[must_use]
    pub fn lock(&self) -> &RangeLock {
        &self.shared.lock
    }

    /// What MODE SELECT has made of it.
    #[inline]
    pub(super) fn modes(&self) -> Modes {
        Modes::from_bits(self.shared.modes.load(Ordering::Relaxed))
    }

    /// For all initiators, from their next command on; unless another one has changed them since they were `before`.
    /// Release: a lane that is asked later (datapath's barrier) finds them.
    pub(super) fn change_modes(&self, before: Modes, modes: Modes) -> bool {
        let (from, to) = (before.to_bits(), modes.to_bits());
        self.shared
            .modes
            .compare_exchange(from, to, Ordering::Release, Ordering::Relaxed)
            .is_ok()
    }

    /// Whether each write has to be durable when it ends.
    #[must_use]
    pub fn writes_through(&self) -> bool {
        self.modes().write_through
    }

    /// Whether sense data is in the descriptor format, unless a command says so.
    #[must_use]
    pub fn senses_in_descriptors(&self) -> bool {
        self.modes().descriptor_sense
    }

    /// Its size.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(super) fn serial(&self) -> &str {
        &self.serial
    }

    pub(super) fn ids(&self) -> &UnitIds {
        &self.ids
    }

    pub(super) fn health(&self) -> &Health {
        &self.health
    }

    pub(super) fn has_volatile_cache(&self) -> bool {
        self.volatile_cache
    }

    pub(super) fn can_unmap(&self) -> bool {
        self.unmap
    }

    pub(super) fn can_write_zeroes(&self) -> bool {
        self.write_zeroes
    }

    pub(super) fn unmapped_reads_zero(&self) -> bool {
        self.unmapped_reads_zero
    }

    /// The same unit through a host that only lets it be read.
    #[must_use]
    pub fn with_read_only(self, read_only: bool) -> LogicalUnit {
        let geometry = self.geometry.with_read_only(read_only);
        LogicalUnit { geometry, ..self }
    }

    /// Another initiator has it from now on.
    pub(super) fn share(&self, initiator: &Initiator) -> Result<Arc<Conditions>, ShareError> {
        for place in &self.shared.sharers {
            let mut fresh = false;
            let sharer = place.get_or_init(|| {
                fresh = true;
                Sharer {
                    initiator: initiator.clone(),
                    conditions: Arc::default(),
                }
            });
            if fresh {
                return Ok(Arc::clone(&sharer.conditions));
            }
            if sharer.initiator == *initiator {
                return Err(ShareError::Taken(initiator.clone()));
            }
        }
        Err(ShareError::Full)
    }

    fn sharers(&self) -> impl Iterator<Item = &Sharer> {
        self.shared.sharers.iter().map_while(OnceLock::get)
    }

    /// This has happened to it: every initiator but `own` is told.
    pub(super) fn attend_others(&self, own: &Arc<Conditions>, attention: Attention) {
        for sharer in self.sharers() {
            if !Arc::ptr_eq(&sharer.conditions, own) {
                sharer.conditions.establish(attention);
            }
        }
    }
}
