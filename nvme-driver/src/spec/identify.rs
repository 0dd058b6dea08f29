//! Identify data structures. NVM Express Base 2.0, "Identify command"; NVM Command Set 1.0, "Identify Namespace".
//! The structures hold the fields that we read or set, at their offsets; everything else is kept as bytes.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Controller or Namespace Structure: what an Identify command asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cns {
    /// Identify Namespace data structure for the NSID.
    Namespace = 0x00,
    /// Identify Controller data structure.
    Controller = 0x01,
    /// Active namespaces with an identifier greater than the NSID, at most 1024.
    ActiveNamespaces = 0x02,
    /// Namespace Identification Descriptor list for the NSID.
    NamespaceDescriptors = 0x03,
}

/// Identify Controller, 4096 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI vendor ID.
    pub vid: U16,
    /// PCI subsystem vendor ID.
    pub ssvid: U16,
    /// Serial number, ASCII, space padded.
    pub sn: [u8; 20],
    /// Model number, ASCII, space padded.
    pub mn: [u8; 40],
    /// Firmware revision, ASCII, space padded.
    pub fr: [u8; 8],
    /// Recommended arbitration burst.
    pub rab: u8,
    /// IEEE OUI.
    pub ieee: [u8; 3],
    /// Multi-path and namespace sharing capabilities.
    pub cmic: u8,
    /// Maximum data transfer size as a power of two of CAP.MPSMIN pages; 0 is no limit.
    pub mdts: u8,
    /// Controller ID.
    pub cntlid: U16,
    /// Version.
    pub ver: U32,
    /// RTD3 resume latency in microseconds.
    pub rtd3r: U32,
    /// RTD3 entry latency in microseconds: how long a shutdown may take.
    pub rtd3e: U32,
    /// Optional asynchronous events supported.
    pub oaes: U32,
    /// Controller attributes.
    pub ctratt: U32,
    reserved_100: [u8; 11],
    /// Controller type: 1 is an I/O controller; 0 before NVMe 1.4.
    pub cntrltype: u8,
    reserved_112: [u8; 144],
    /// Optional admin command support.
    pub oacs: U16,
    /// Abort command limit, zero-based.
    pub acl: u8,
    /// Asynchronous event request limit, zero-based.
    pub aerl: u8,
    /// Firmware updates.
    pub frmw: u8,
    /// Log page attributes.
    pub lpa: u8,
    /// Error log page entries, zero-based.
    pub elpe: u8,
    /// Number of power states, zero-based.
    pub npss: u8,
    /// Admin vendor specific command configuration.
    pub avscc: u8,
    /// Autonomous power state transition attributes.
    pub apsta: u8,
    /// Warning composite temperature threshold, kelvin.
    pub wctemp: U16,
    /// Critical composite temperature threshold, kelvin.
    pub cctemp: U16,
    reserved_270: [u8; 10],
    /// Total NVM capacity in bytes, 128 bits.
    pub tnvmcap: [u8; 16],
    /// Unallocated NVM capacity in bytes, 128 bits.
    pub unvmcap: [u8; 16],
    reserved_312: [u8; 8],
    /// Keep alive support in 100 ms units; 0 is not supported.
    pub kas: U16,
    reserved_322: [u8; 190],
    /// Submission queue entry size: required (3:0) and maximum (7:4), powers of two.
    pub sqes: u8,
    /// Completion queue entry size: required (3:0) and maximum (7:4), powers of two.
    pub cqes: u8,
    /// Maximum outstanding commands; 0 is not reported.
    pub maxcmd: U16,
    /// Number of namespaces (the largest NSID).
    pub nn: U32,
    /// Optional NVM command support.
    pub oncs: U16,
    /// Fused operation support.
    pub fuses: U16,
    /// Format NVM attributes.
    pub fna: u8,
    /// Volatile write cache: bit 0 present; bits 2:1 what Flush does with the broadcast NSID.
    pub vwc: u8,
    /// Atomic write unit normal, zero-based logical blocks.
    pub awun: U16,
    /// Atomic write unit power fail, zero-based logical blocks.
    pub awupf: U16,
    reserved_530: [u8; 6],
    /// SGL support.
    pub sgls: U32,
    /// Maximum number of allowed namespaces.
    pub mnan: U32,
    reserved_544: [u8; 224],
    /// NVM subsystem NQN, UTF-8, zero terminated.
    pub subnqn: [u8; 256],
    reserved_1024: [u8; 3072],
}

const _: () = assert!(size_of::<IdentifyController>() == 4096);
const _: () = assert!(std::mem::offset_of!(IdentifyController, mdts) == 77);
const _: () = assert!(std::mem::offset_of!(IdentifyController, cntrltype) == 111);
const _: () = assert!(std::mem::offset_of!(IdentifyController, oacs) == 256);
const _: () = assert!(std::mem::offset_of!(IdentifyController, tnvmcap) == 280);
const _: () = assert!(std::mem::offset_of!(IdentifyController, kas) == 320);
const _: () = assert!(std::mem::offset_of!(IdentifyController, sqes) == 512);
const _: () = assert!(std::mem::offset_of!(IdentifyController, sgls) == 536);
const _: () = assert!(std::mem::offset_of!(IdentifyController, subnqn) == 768);

/// Bits of [`IdentifyController::oacs`].
pub mod oacs {
    /// Doorbell Buffer Config.
    pub const DOORBELL_BUFFER_CONFIG: u16 = 1 << 8;
}

/// Bits of [`IdentifyController::oncs`].
pub mod oncs {
    /// Compare.
    pub const COMPARE: u16 = 1 << 0;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u16 = 1 << 2;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u16 = 1 << 3;
    /// The Save field of Set Features and the Select field of Get Features.
    pub const SAVE_AND_SELECT: u16 = 1 << 4;
    /// Copy.
    pub const COPY: u16 = 1 << 8;
}

impl IdentifyController {
    /// All zero: a blank to fill in.
    #[must_use]
    pub fn zeroed() -> IdentifyController {
        zerocopy::FromZeros::new_zeroed()
    }

    /// The most bytes that one command may move, `None` for no limit.
    #[must_use]
    pub fn max_transfer(&self, min_page_size: u64) -> Option<u64> {
        (self.mdts != 0).then(|| {
            min_page_size
                .checked_shl(u32::from(self.mdts))
                .unwrap_or(u64::MAX)
        })
    }

    /// VWC bit 0: a volatile write cache is present, so Flush means something.
    #[must_use]
    pub fn has_volatile_write_cache(&self) -> bool {
        self.vwc & 1 != 0
    }

    /// All bits of `command` (see [`oncs`]) are set.
    #[must_use]
    pub fn supports(&self, command: u16) -> bool {
        self.oncs.get() & command == command
    }
}

impl std::fmt::Debug for IdentifyController {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IdentifyController")
            .field("sn", &super::ascii_field(&self.sn))
            .field("mn", &super::ascii_field(&self.mn))
            .field("mdts", &self.mdts)
            .field("nn", &self.nn.get())
            .field("oncs", &self.oncs.get())
            .field("vwc", &self.vwc)
            .finish_non_exhaustive()
    }
}

/// One LBA format, 4 bytes.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LbaFormat {
    /// Metadata bytes per block.
    pub ms: U16,
    /// Block size as a power of two.
    pub lbads: u8,
    /// Relative performance.
    pub rp: u8,
}

/// Identify Namespace (NVM command set), 4096 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Size in logical blocks.
    pub nsze: U64,
    /// Capacity in logical blocks.
    pub ncap: U64,
    /// Utilisation in logical blocks.
    pub nuse: U64,
    /// Features: bit 0 thin provisioning, bit 4 optimal performance fields are defined.
    pub nsfeat: u8,
    /// Number of LBA formats, zero-based.
    pub nlbaf: u8,
    /// Formatted LBA size: index in bits 3:0, and bits 6:5 above them; bit 4 extended metadata.
    pub flbas: u8,
    /// Metadata capabilities.
    pub mc: u8,
    /// Data protection capabilities.
    pub dpc: u8,
    /// Data protection settings; bits 2:0 non-zero when protection information is on.
    pub dps: u8,
    /// Sharing capabilities.
    pub nmic: u8,
    /// Reservation capabilities.
    pub rescap: u8,
    /// Format progress.
    pub fpi: u8,
    /// What deallocated blocks read back: bits 2:0 (1 zeroes, 2 ones); bit 3 Write Zeroes honours DEAC.
    pub dlfeat: u8,
    reserved_34: [u8; 14],
    /// NVM capacity in bytes, 128 bits.
    pub nvmcap: [u8; 16],
    reserved_64: [u8; 10],
    /// Maximum single source range length of Copy, in logical blocks.
    pub mssrl: U16,
    /// Maximum copy length, in logical blocks.
    pub mcl: U32,
    /// Maximum source range count of Copy, zero-based.
    pub msrc: u8,
    reserved_81: [u8; 18],
    /// Namespace attributes: bit 0 write protected.
    pub nsattr: u8,
    reserved_100: [u8; 4],
    /// Namespace globally unique identifier.
    pub nguid: [u8; 16],
    /// IEEE extended unique identifier.
    pub eui64: [u8; 8],
    /// LBA formats.
    pub lbaf: [LbaFormat; 64],
    reserved_384: [u8; 3712],
}

const _: () = assert!(size_of::<IdentifyNamespace>() == 4096);
const _: () = assert!(std::mem::offset_of!(IdentifyNamespace, dlfeat) == 33);
const _: () = assert!(std::mem::offset_of!(IdentifyNamespace, mssrl) == 74);
const _: () = assert!(std::mem::offset_of!(IdentifyNamespace, mcl) == 76);
const _: () = assert!(std::mem::offset_of!(IdentifyNamespace, msrc) == 80);
const _: () = assert!(std::mem::offset_of!(IdentifyNamespace, nsattr) == 99);
const _: () = assert!(std::mem::offset_of!(IdentifyNamespace, nguid) == 104);
const _: () = assert!(std::mem::offset_of!(IdentifyNamespace, eui64) == 120);
const _: () = assert!(std::mem::offset_of!(IdentifyNamespace, lbaf) == 128);

impl IdentifyNamespace {
    /// All zero: a blank to fill in; also how a controller answers for an inactive namespace.
    #[must_use]
    pub fn zeroed() -> IdentifyNamespace {
        zerocopy::FromZeros::new_zeroed()
    }

    /// The LBA format in use.
    #[must_use]
    pub fn format(&self) -> LbaFormat {
        let index = usize::from(self.flbas & 0xf) | (usize::from(self.flbas >> 5 & 3) << 4);
        self.lbaf[index & 63]
    }
}

impl std::fmt::Debug for IdentifyNamespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IdentifyNamespace")
            .field("nsze", &self.nsze.get())
            .field("format", &self.format())
            .field("dlfeat", &self.dlfeat)
            .finish_non_exhaustive()
    }
}

/// Identifiers that a Namespace Identification Descriptor list may carry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceIds {
    /// IEEE extended unique identifier (type 1).
    pub eui64: Option<[u8; 8]>,
    /// Namespace globally unique identifier (type 2).
    pub nguid: Option<[u8; 16]>,
    /// UUID (type 3).
    pub uuid: Option<[u8; 16]>,
    /// Command Set Identifier (type 4): 0 is the NVM command set, 2 the Zoned Namespace command set.
    pub command_set: Option<u8>,
}

impl NamespaceIds {
    /// Parses a descriptor list; unknown types are skipped, a malformed tail ends the list.
    #[must_use]
    pub fn parse(list: &[u8]) -> NamespaceIds {
        let mut ids = NamespaceIds::default();
        let mut rest = list;
        while let [kind, len, _, _, tail @ ..] = rest {
            let Some((value, next)) = tail.split_at_checked(usize::from(*len)) else {
                break;
            };
            match kind {
                _ if *len == 0 => break,
                1 => ids.eui64 = value.try_into().ok(),
                2 => ids.nguid = value.try_into().ok(),
                3 => ids.uuid = value.try_into().ok(),
                4 => ids.command_set = value.first().copied(),
                _ => {}
            }
            rest = next;
        }
        ids
    }

    /// The list as a controller returns it: 4-byte headers (NIDT, NIDL, reserved) and values, zero terminated.
    #[must_use]
    pub fn to_list(&self) -> Vec<u8> {
        let mut list = Vec::new();
        let mut push = |kind: u8, value: &[u8]| {
            list.extend_from_slice(&[kind, u8::try_from(value.len()).unwrap_or(0), 0, 0]);
            list.extend_from_slice(value);
        };
        if let Some(value) = &self.eui64 {
            push(1, value);
        }
        if let Some(value) = &self.nguid {
            push(2, value);
        }
        if let Some(value) = &self.uuid {
            push(3, value);
        }
        if let Some(value) = self.command_set {
            push(4, &[value]);
        }
        list
    }
}
