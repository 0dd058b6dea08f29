//! The commands: which there are, which bits of a CDB each looks at, who handles it.
//!
//! A bit that no command looks at must be zero; a CDB with one that is not is refused with a pointer to it. So the usage
//! data that REPORT SUPPORTED OPERATION CODES gives is what really counts.

use super::attention::denied;
use super::sense::Sense;
use super::target::{Role, Seat};
use super::unit::LogicalUnit;
use super::{Action, Exchange, Result, copy, inquiry, log, medium, mode, persistent, port, target};

/// The longest CDB that any of the commands has, and the transport's usual size.
pub const CDB_BYTES: usize = 32;

/// A command descriptor block, zero padded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cdb {
    bytes: [u8; CDB_BYTES],
    /// As many bytes as the transport brought.
    len: usize,
}

impl Cdb {
    /// The CDB in `bytes`; what lies behind [`CDB_BYTES`] is beyond any command.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Cdb {
        let len = bytes.len().min(CDB_BYTES);
        let mut cdb = Cdb {
            bytes: [0; CDB_BYTES],
            len,
        };
        cdb.bytes[..len].copy_from_slice(&bytes[..len]);
        cdb
    }

    /// The operation code.
    #[must_use]
    pub fn opcode(&self) -> u8 {
        self.bytes[0]
    }

    pub(super) fn byte(&self, at: usize) -> u8 {
        self.bytes[at]
    }

    pub(super) fn bit(&self, at: usize, bit: u32) -> bool {
        self.bytes[at] >> bit & 1 != 0
    }

    pub(super) fn be16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    pub(super) fn be32(&self, at: usize) -> u32 {
        u32::from(self.be16(at)) << 16 | u32::from(self.be16(at + 2))
    }

    pub(super) fn be64(&self, at: usize) -> u64 {
        u64::from(self.be32(at)) << 32 | u64::from(self.be32(at + 4))
    }
}

/// Where a command is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// On logical units.
    Unit,
    /// And on the REPORT LUNS well-known logical unit.
    WellKnown,
    /// And where there is no logical unit; also while a unit attention waits to be told (SAM-5, 5.14.5).
    Always,
}

/// What reservations of other initiators make of a command (SPC-4, table 66; SBC-3, table 15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Nothing: it is carried out.
    Any,
    /// It tells of the unit, which a reservation of SPC-2 denies and a persistent one does not.
    Tells,
    /// It reads blocks or parameters.
    Reads,
    /// It changes something.
    Writes,
    /// START STOP UNIT: a start is none to be afraid of.
    StartStop,
    /// PREVENT ALLOW MEDIUM REMOVAL: an allow is none either.
    PreventAllow,
    /// It is about reservations, and looks itself.
    Reserves,
}

impl Access {
    /// What must not be denied.
    pub(super) fn needs(self, cdb: &Cdb) -> u32 {
        const READS: u32 = denied::RESERVED | denied::READS;
        const WRITES: u32 = denied::RESERVED | denied::WRITES;
        match self {
            Access::Any | Access::Reserves => 0,
            Access::Tells => denied::RESERVED,
            Access::Reads => READS,
            Access::Writes => WRITES,
            Access::StartStop if cdb.bit(4, 0) && cdb.byte(4) >> 4 == 0 => denied::RESERVED,
            Access::PreventAllow if cdb.byte(4) & 3 == 0 => 0,
            Access::StartStop | Access::PreventAllow => WRITES,
        }
    }
}

/// What a command takes from the initiator beside its CDB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataOut {
    /// Nothing, or data that is not for us to look at.
    None,
    /// A parameter list of as many bytes as the byte at this place says.
    Length8(usize),
    /// A parameter list of as many bytes as the 16 bits at this place say.
    Length16(usize),
    /// The same with 32 bits.
    Length32(usize),
    /// One block, unless the bit 0 of byte 1 (NDOB) says that there is none.
    Block { ndob: bool },
}

pub(super) type Handler = fn(&Seat<'_>, &mut Exchange<'_>) -> Result<Action>;

/// One command.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// Its operation code.
    pub opcode: u8,
    /// Its service action, if the operation code has several.
    pub service_action: Option<u8>,
    /// CDB usage data (SPC-4, 6.35.3): the operation code and service action, and a 1 for each bit that is looked at. As
    /// long as the CDB.
    pub usage: &'static [u8],
    pub(super) scope: Scope,
    pub(super) access: Access,
    pub(super) data_out: DataOut,
    pub(super) handler: Handler,
    /// What a logical unit has to be able to do for it.
    needs: Option<fn(&LogicalUnit) -> bool>,
}

const fn command(
    usage: &'static [u8],
    scope: Scope,
    access: Access,
    data_out: DataOut,
    handler: Handler,
) -> Command {
    Command {
        opcode: usage[0],
        service_action: None,
        usage,
        scope,
        access,
        data_out,
        handler,
        needs: None,
    }
}

/// A command that not every logical unit has.
const fn where_unit(can: fn(&LogicalUnit) -> bool, command: Command) -> Command {
    Command {
        needs: Some(can),
        ..command
    }
}

const fn with_action(
    usage: &'static [u8],
    action: u8,
    scope: Scope,
    access: Access,
    handler: Handler,
) -> Command {
    Command {
        service_action: Some(action),
        ..command(usage, scope, access, DataOut::None, handler)
    }
}

/// PERSISTENT RESERVE IN.
const fn reserve_in(action: u8, usage: &'static [u8], handler: Handler) -> Command {
    with_action(usage, action, Scope::Unit, Access::Reserves, handler)
}

/// PERSISTENT RESERVE OUT. SCOPE and TYPE are looked at where a service action has them, and else ignored.
const fn reserve_out(action: u8, usage: &'static [u8]) -> Command {
    Command {
        data_out: DataOut::Length32(5),
        ..reserve_in(action, usage, persistent::defer)
    }
}

// RDPROTECT, WRPROTECT and the control byte with NACA are not looked at and so must be zero. The group number is looked at
// and means nothing here (SBC-3, 4.22).
const RW: u8 = 0x18; // DPO, FUA
const VERIFY: u8 = 0x16; // DPO, BYTCHK
const GROUP: u8 = 0x1f;
const X: u8 = 0xff;

/// All commands, by operation code and service action.
#[rustfmt::skip]
pub const COMMANDS: &[Command] = &[
    // TEST UNIT READY
    command(&[0x00, 0, 0, 0, 0, 0], Scope::WellKnown, Access::Tells, DataOut::None, target::test_unit_ready),
    // REQUEST SENSE
    command(&[0x03, 0x01, 0, 0, X, 0], Scope::Always, Access::Any, DataOut::None, target::request_sense),
    // READ (6)
    command(&[0x08, 0x1f, X, X, X, 0], Scope::Unit, Access::Reads, DataOut::None, medium::read_6),
    // WRITE (6)
    command(&[0x0a, 0x1f, X, X, X, 0], Scope::Unit, Access::Writes, DataOut::None, medium::write_6),
    // INQUIRY
    command(&[0x12, 0x01, X, X, X, 0], Scope::Always, Access::Any, DataOut::None, inquiry::inquiry),
    // MODE SELECT (6)
    command(&[0x15, 0x10, 0, 0, X, 0], Scope::Unit, Access::Writes, DataOut::Length8(4), mode::select_6),
    // RESERVE (6)
    command(&[0x16, 0, 0, 0, 0, 0], Scope::Unit, Access::Reserves, DataOut::None, persistent::defer),
    // RELEASE (6)
    command(&[0x17, 0, 0, 0, 0, 0], Scope::Unit, Access::Reserves, DataOut::None, persistent::defer),
    // MODE SENSE (6)
    command(&[0x1a, 0x08, X, X, X, 0], Scope::Unit, Access::Reads, DataOut::None, mode::sense_6),
    // START STOP UNIT
    command(&[0x1b, 0x01, 0, 0x0f, 0xf7, 0], Scope::Unit, Access::StartStop, DataOut::None, medium::start_stop_unit),
    // PREVENT ALLOW MEDIUM REMOVAL
    command(&[0x1e, 0, 0, 0, 0x03, 0], Scope::Unit, Access::PreventAllow, DataOut::None, medium::prevent_allow),
    // READ CAPACITY (10)
    command(&[0x25, 0, X, X, X, X, 0, 0, 0x01, 0], Scope::Unit, Access::Tells, DataOut::None, medium::read_capacity_10),
    // READ (10)
    command(&[0x28, RW, X, X, X, X, GROUP, X, X, 0], Scope::Unit, Access::Reads, DataOut::None, medium::read_10),
    // WRITE (10)
    command(&[0x2a, RW, X, X, X, X, GROUP, X, X, 0], Scope::Unit, Access::Writes, DataOut::None, medium::write_10),
    // WRITE AND VERIFY (10)
    command(&[0x2e, VERIFY, X, X, X, X, GROUP, X, X, 0], Scope::Unit, Access::Writes, DataOut::None, medium::write_and_verify_10),
    // VERIFY (10)
    command(&[0x2f, VERIFY, X, X, X, X, GROUP, X, X, 0], Scope::Unit, Access::Reads, DataOut::None, medium::verify_10),
    // PRE-FETCH (10)
    command(&[0x34, 0x02, X, X, X, X, GROUP, X, X, 0], Scope::Unit, Access::Reads, DataOut::None, medium::pre_fetch_10),
    // SYNCHRONIZE CACHE (10)
    command(&[0x35, 0x02, X, X, X, X, GROUP, X, X, 0], Scope::Unit, Access::Writes, DataOut::None, medium::synchronize_cache_10),
    // WRITE SAME (10)
    command(&[0x41, 0x08, X, X, X, X, GROUP, X, X, 0], Scope::Unit, Access::Writes, DataOut::Block { ndob: false }, medium::write_same_10),
    // UNMAP
    where_unit(LogicalUnit::can_unmap, command(&[0x42, 0, 0, 0, 0, 0, GROUP, X, X, 0], Scope::Unit, Access::Writes, DataOut::Length16(7), medium::unmap)),
    // LOG SENSE
    command(&[0x4d, 0, X, X, 0, X, X, X, X, 0], Scope::Unit, Access::Tells, DataOut::None, log::log_sense),
    // MODE SELECT (10)
    command(&[0x55, 0x10, 0, 0, 0, 0, 0, X, X, 0], Scope::Unit, Access::Writes, DataOut::Length16(7), mode::select_10),
    // RESERVE (10)
    command(&[0x56, 0, 0, 0, 0, 0, 0, 0, 0, 0], Scope::Unit, Access::Reserves, DataOut::None, persistent::defer),
    // RELEASE (10)
    command(&[0x57, 0, 0, 0, 0, 0, 0, 0, 0, 0], Scope::Unit, Access::Reserves, DataOut::None, persistent::defer),
    // MODE SENSE (10)
    command(&[0x5a, 0x18, X, X, 0, 0, 0, X, X, 0], Scope::Unit, Access::Reads, DataOut::None, mode::sense_10),
    // PERSISTENT RESERVE IN, READ KEYS
    reserve_in(0, &[0x5e, 0x00, 0, 0, 0, 0, 0, X, X, 0], persistent::read_keys),
    // PERSISTENT RESERVE IN, READ RESERVATION
    reserve_in(1, &[0x5e, 0x01, 0, 0, 0, 0, 0, X, X, 0], persistent::read_reservation),
    // PERSISTENT RESERVE IN, REPORT CAPABILITIES
    reserve_in(2, &[0x5e, 0x02, 0, 0, 0, 0, 0, X, X, 0], persistent::report_capabilities),
    // PERSISTENT RESERVE IN, READ FULL STATUS
    reserve_in(3, &[0x5e, 0x03, 0, 0, 0, 0, 0, X, X, 0], persistent::read_full_status),
    // PERSISTENT RESERVE OUT, REGISTER
    reserve_out(0, &[0x5f, 0x00, X, 0, 0, X, X, X, X, 0]),
    // PERSISTENT RESERVE OUT, RESERVE
    reserve_out(1, &[0x5f, 0x01, X, 0, 0, X, X, X, X, 0]),
    // PERSISTENT RESERVE OUT, RELEASE
    reserve_out(2, &[0x5f, 0x02, X, 0, 0, X, X, X, X, 0]),
    // PERSISTENT RESERVE OUT, CLEAR
    reserve_out(3, &[0x5f, 0x03, X, 0, 0, X, X, X, X, 0]),
    // PERSISTENT RESERVE OUT, PREEMPT
    reserve_out(4, &[0x5f, 0x04, X, 0, 0, X, X, X, X, 0]),
    // PERSISTENT RESERVE OUT, PREEMPT AND ABORT
    reserve_out(5, &[0x5f, 0x05, X, 0, 0, X, X, X, X, 0]),
    // PERSISTENT RESERVE OUT, REGISTER AND IGNORE EXISTING KEY
    reserve_out(6, &[0x5f, 0x06, X, 0, 0, X, X, X, X, 0]),
    // EXTENDED COPY (LID1)
    where_unit(LogicalUnit::can_copy, Command { data_out: DataOut::Length32(10), ..with_action(&[0x83, 0x00, 0, 0, 0, 0, 0, 0, 0, 0, X, X, X, X, 0, 0], 0, Scope::Unit, Access::Writes, copy::extended_copy) }),
    // RECEIVE COPY RESULTS, COPY STATUS (LID1)
    where_unit(LogicalUnit::can_copy, with_action(&[0x84, 0x00, X, 0, 0, 0, 0, 0, 0, 0, X, X, X, X, 0, 0], 0, Scope::Unit, Access::Writes, copy::copy_status)),
    // RECEIVE COPY RESULTS, OPERATING PARAMETERS
    where_unit(LogicalUnit::can_copy, with_action(&[0x84, 0x03, 0, 0, 0, 0, 0, 0, 0, 0, X, X, X, X, 0, 0], 3, Scope::Unit, Access::Writes, copy::operating_parameters)),
    // READ (16)
    command(&[0x88, RW, X, X, X, X, X, X, X, X, X, X, X, X, GROUP, 0], Scope::Unit, Access::Reads, DataOut::None, medium::read_16),
    // COMPARE AND WRITE
    command(&[0x89, RW, X, X, X, X, X, X, X, X, 0, 0, 0, X, GROUP, 0], Scope::Unit, Access::Writes, DataOut::None, medium::compare_and_write),
    // WRITE (16)
    command(&[0x8a, RW, X, X, X, X, X, X, X, X, X, X, X, X, GROUP, 0], Scope::Unit, Access::Writes, DataOut::None, medium::write_16),
    // WRITE AND VERIFY (16)
    command(&[0x8e, VERIFY, X, X, X, X, X, X, X, X, X, X, X, X, GROUP, 0], Scope::Unit, Access::Writes, DataOut::None, medium::write_and_verify_16),
    // VERIFY (16)
    command(&[0x8f, VERIFY, X, X, X, X, X, X, X, X, X, X, X, X, GROUP, 0], Scope::Unit, Access::Reads, DataOut::None, medium::verify_16),
    // PRE-FETCH (16)
    command(&[0x90, 0x02, X, X, X, X, X, X, X, X, X, X, X, X, GROUP, 0], Scope::Unit, Access::Reads, DataOut::None, medium::pre_fetch_16),
    // SYNCHRONIZE CACHE (16)
    command(&[0x91, 0x02, X, X, X, X, X, X, X, X, X, X, X, X, GROUP, 0], Scope::Unit, Access::Writes, DataOut::None, medium::synchronize_cache_16),
    // WRITE SAME (16)
    command(&[0x93, 0x09, X, X, X, X, X, X, X, X, X, X, X, X, GROUP, 0], Scope::Unit, Access::Writes, DataOut::Block { ndob: true }, medium::write_same_16),
    // READ CAPACITY (16)
    with_action(&[0x9e, 0x10, X, X, X, X, X, X, X, X, X, X, X, X, 0x01, 0], 0x10, Scope::Unit, Access::Tells, medium::read_capacity_16),
    // GET LBA STATUS
    with_action(&[0x9e, 0x12, X, X, X, X, X, X, X, X, X, X, X, X, 0, 0], 0x12, Scope::Unit, Access::Reads, medium::get_lba_status),
    // REPORT LUNS
    command(&[0xa0, 0, X, 0, 0, 0, X, X, X, X, 0, 0], Scope::Always, Access::Any, DataOut::None, target::report_luns),
    // REPORT TARGET PORT GROUPS
    with_action(&[0xa3, 0xea, 0, 0, 0, 0, X, X, X, X, 0, 0], 0x0a, Scope::Unit, Access::Tells, port::report_target_port_groups),
    // REPORT SUPPORTED OPERATION CODES
    with_action(&[0xa3, 0x0c, 0x87, X, X, X, X, X, X, X, 0, 0], 0x0c, Scope::WellKnown, Access::Reads, report_supported_operation_codes),
    // REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS
    with_action(&[0xa3, 0x0d, 0x80, 0, 0, 0, X, X, X, X, 0, 0], 0x0d, Scope::WellKnown, Access::Reads, report_supported_task_management),
    // READ (12)
    command(&[0xa8, RW, X, X, X, X, X, X, X, X, GROUP, 0], Scope::Unit, Access::Reads, DataOut::None, medium::read_12),
    // WRITE (12)
    command(&[0xaa, RW, X, X, X, X, X, X, X, X, GROUP, 0], Scope::Unit, Access::Writes, DataOut::None, medium::write_12),
    // WRITE AND VERIFY (12)
    command(&[0xae, VERIFY, X, X, X, X, X, X, X, X, GROUP, 0], Scope::Unit, Access::Writes, DataOut::None, medium::write_and_verify_12),
    // VERIFY (12)
    command(&[0xaf, VERIFY, X, X, X, X, X, X, X, X, GROUP, 0], Scope::Unit, Access::Reads, DataOut::None, medium::verify_12),
];

/// Where the entries of each operation code are in the table: the first one, and how many.
const INDEX: [(u8, u8); 256] = {
    let mut index = [(0, 0); 256];
    let mut at = 0;
    while at < COMMANDS.len() {
        let entry = &mut index[COMMANDS[at].opcode as usize];
        if entry.1 == 0 {
            #[allow(clippy::cast_possible_truncation)] // far fewer than 256 commands
            let first = at as u8;
            entry.0 = first;
        }
        entry.1 += 1;
        at += 1;
    }
    index
};

const SERVICE_ACTION: u8 = 0x1f;

impl Command {
    fn has_action_of(&self, cdb: &Cdb) -> bool {
        let action = cdb.byte(1) & SERVICE_ACTION;
        self.service_action.is_none_or(|own| own == action)
    }
}

fn commands_of(opcode: u8) -> &'static [Command] {
    let (first, count) = INDEX[usize::from(opcode)];
    let first = usize::from(first);
    &COMMANDS[first..first + usize::from(count)]
}

/// The command of a CDB.
pub(super) fn find(cdb: &Cdb) -> Option<&'static Command> {
    let found = commands_of(cdb.opcode())
        .iter()
        .find(|command| command.has_action_of(cdb))?;
    (found.usage.len() <= cdb.len).then_some(found)
}

/// Why a CDB has no command that is served there. A service action that is not known is an invalid field of an operation
/// code that is (SPC-4, 4.2.5.1).
#[cold]
pub(super) fn why_not(cdb: &Cdb, seat: &Seat<'_>) -> Sense {
    let same = commands_of(cdb.opcode()).iter();
    let mut served = same.filter(|command| serves(command, seat)).peekable();
    let exists = served.peek().is_some();
    match exists && !served.any(|command| command.has_action_of(cdb)) {
        true => Sense::in_cdb(1, 4),
        false => Sense::INVALID_OPCODE,
    }
}

/// Refuses a CDB with a bit that its command does not look at.
pub(super) fn check_unused(command: &Command, cdb: &Cdb) -> Result<()> {
    for (at, usage) in command.usage.iter().enumerate().skip(1) {
        // The service action was looked at to find the command.
        let used = match command.service_action {
            Some(_) if at == 1 => usage | SERVICE_ACTION,
            _ => *usage,
        };
        let stray = cdb.byte(at) & !used;
        if let Some(bit) = stray.checked_ilog2() {
            // A CDB has 32 bytes, a byte 8 bits.
            let (at, bit) = (
                u16::try_from(at).unwrap_or(0),
                u8::try_from(bit).unwrap_or(0),
            );
            return Err(Sense::in_cdb(at, bit));
        }
    }
    Ok(())
}

/// How many bytes of the initiator's data a command has to be given with it. 0 where there is none for us to look at, also
/// for a command that will be refused.
#[must_use]
pub fn parameter_bytes(cdb: &Cdb, unit: Option<&LogicalUnit>) -> u32 {
    match find(cdb).map(|command| command.data_out) {
        Some(DataOut::Length8(at)) => cdb.byte(at).into(),
        Some(DataOut::Length16(at)) => cdb.be16(at).into(),
        Some(DataOut::Length32(at)) => cdb.be32(at),
        Some(DataOut::Block { ndob }) if !(ndob && cdb.bit(1, 0)) => {
            unit.map_or(0, |unit| unit.geometry().block_bytes())
        }
        _ => 0,
    }
}

/// Whether a command is served there.
pub(super) fn serves(command: &Command, seat: &Seat<'_>) -> bool {
    match seat.role() {
        Role::Unit => command
            .needs
            .is_none_or(|can| seat.unit().is_ok_and(|(unit, _)| can(unit))),
        Role::WellKnown => command.scope != Scope::Unit,
        Role::Absent => command.scope == Scope::Always,
    }
}

/// SPC-4, 6.35.
fn report_supported_operation_codes(
    seat: &Seat<'_>,
    exchange: &mut Exchange<'_>,
) -> Result<Action> {
    let cdb = exchange.cdb;
    let timeouts = cdb.bit(2, 7);
    let (opcode, action) = (cdb.byte(3), cdb.be16(4));
    let supported = |command: &&Command| serves(command, seat);
    let same = || commands_of(opcode).iter().filter(supported);
    let has_actions = same().any(|command| command.service_action.is_some());
    let with_action = |command: &&Command| {
        let own = command.service_action.map_or(0, u16::from);
        own == action
    };
    match cdb.byte(2) & 7 {
        0 => all_commands(COMMANDS.iter().filter(supported), timeouts, exchange),
        1 if has_actions => return Err(Sense::in_cdb(2, 2)),
        1 => one_command(same().next(), timeouts, exchange),
        // An operation code that is not there has no service actions either: not supported, and no error.
        2 if same().next().is_some() && !has_actions => return Err(Sense::in_cdb(2, 2)),
        2 | 3 => one_command(same().find(with_action), timeouts, exchange),
        _ => return Err(Sense::in_cdb(2, 2)),
    }
    exchange.data_in.truncate(cdb.be32(6));
    Ok(Action::Good)
}

/// SPC-4, 6.36.
fn report_supported_task_management(
    _seat: &Seat<'_>,
    exchange: &mut Exchange<'_>,
) -> Result<Action> {
    // Abort a task, a set, clear a set, reset a logical unit, query a task; query a set, reset a nexus.
    const FUNCTIONS: [u8; 2] = [0x80 | 0x40 | 0x10 | 0x08 | 0x04, 0x02 | 0x01];
    let allocation_length = exchange.cdb.be32(6);
    if allocation_length < 4 {
        return Err(Sense::in_cdb(6, 7));
    }
    exchange.data_in.put(&FUNCTIONS);
    exchange.data_in.put(&[0, 0]);
    if exchange.cdb.bit(2, 7) {
        // Extended parameter data: no times.
        exchange.data_in.set(3, &[0x0c]);
        exchange.data_in.put(&[0; 12]);
    }
    exchange.data_in.truncate(allocation_length);
    Ok(Action::Good)
}

/// A command timeouts descriptor that says nothing of times (SPC-4, 6.35.4).
const TIMEOUTS: [u8; 12] = [0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn all_commands<'a>(
    commands: impl Iterator<Item = &'a Command>,
    timeouts: bool,
    exchange: &mut Exchange<'_>,
) {
    let out = &mut exchange.data_in;
    out.put(&[0; 4]);
    for command in commands {
        let flags = u8::from(timeouts) << 1 | u8::from(command.service_action.is_some());
        let action = command.service_action.unwrap_or(0);
        // A CDB has at most 32 bytes.
        let len = u8::try_from(command.usage.len()).unwrap_or(0);
        out.put(&[command.opcode, 0, 0, action, 0, flags, 0, len]);
        if timeouts {
            out.put(&TIMEOUTS);
        }
    }
    let len = u32::try_from(out.len() - 4).unwrap_or(0);
    out.set(0, &len.to_be_bytes());
}

fn one_command(command: Option<&Command>, timeouts: bool, exchange: &mut Exchange<'_>) {
    let out = &mut exchange.data_in;
    let Some(command) = command else {
        // SUPPORT 001b: it is not.
        out.put(&[0, 0x01, 0, 0]);
        return;
    };
    // SUPPORT 011b: as the standard says.
    let flags = u8::from(timeouts) << 7 | 0x03;
    let len = u8::try_from(command.usage.len()).unwrap_or(0);
    out.put(&[0, flags, 0, len]);
    out.put(command.usage);
    if timeouts {
        out.put(&TIMEOUTS);
    }
}
