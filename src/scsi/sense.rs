//! Sense data (SPC-4, 4.5): why a command ended with CHECK CONDITION, in the fixed or the descriptor format.

/// Sense keys (SPC-4, table 46).
pub mod key {
    /// Nothing to report.
    pub const NO_SENSE: u8 = 0x0;
    /// The logical unit cannot be accessed.
    pub const NOT_READY: u8 = 0x2;
    /// The medium lost or refused data.
    pub const MEDIUM_ERROR: u8 = 0x3;
    /// The device failed.
    pub const HARDWARE_ERROR: u8 = 0x4;
    /// The command or its parameters are wrong.
    pub const ILLEGAL_REQUEST: u8 = 0x5;
    /// Something happened to the logical unit that its initiator should know.
    pub const UNIT_ATTENTION: u8 = 0x6;
    /// The blocks may not be written, or not be read.
    pub const DATA_PROTECT: u8 = 0x7;
    /// A copy by the device was given up.
    pub const COPY_ABORTED: u8 = 0xa;
    /// The device gave the command up.
    pub const ABORTED_COMMAND: u8 = 0xb;
    /// The data is not what it was compared with.
    pub const MISCOMPARE: u8 = 0xe;
}

/// The longest encoding: a header of 8 bytes, the information and the sense-key-specific descriptor.
pub const MAX_SENSE_BYTES: usize = 8 + 12 + 8;

/// Where the field is that a command was refused for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldPointer {
    /// In the CDB, or else in the parameter list.
    pub in_cdb: bool,
    /// Which byte of it.
    pub byte: u16,
    /// The field's leftmost bit, if a single one is meant.
    pub bit: Option<u8>,
}

/// Why a command did not end well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// One of [`key`].
    pub key: u8,
    /// Additional sense code.
    pub asc: u8,
    /// And its qualifier.
    pub ascq: u8,
    /// The LBA of a block, or of a miscompare how many bytes of the Data-Out Buffer are as they should be.
    pub information: Option<u64>,
    /// The field at fault.
    pub field: Option<FieldPointer>,
}

impl Sense {
    /// A key with its code and qualifier.
    #[must_use]
    pub const fn new(key: u8, asc: u8, ascq: u8) -> Sense {
        Sense {
            key,
            asc,
            ascq,
            information: None,
            field: None,
        }
    }

    /// Nothing to report.
    pub const NONE: Sense = Sense::new(key::NO_SENSE, 0, 0);
    /// INVALID COMMAND OPERATION CODE.
    pub const INVALID_OPCODE: Sense = Sense::new(key::ILLEGAL_REQUEST, 0x20, 0);
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub const OUT_OF_RANGE: Sense = Sense::new(key::ILLEGAL_REQUEST, 0x21, 0);
    /// LOGICAL UNIT NOT SUPPORTED.
    pub const NO_UNIT: Sense = Sense::new(key::ILLEGAL_REQUEST, 0x25, 0);
    /// PARAMETER LIST LENGTH ERROR.
    pub const PARAMETER_LENGTH: Sense = Sense::new(key::ILLEGAL_REQUEST, 0x1a, 0);
    /// SAVING PARAMETERS NOT SUPPORTED.
    pub const NOT_SAVED: Sense = Sense::new(key::ILLEGAL_REQUEST, 0x39, 0);
    /// WRITE PROTECTED.
    pub const WRITE_PROTECTED: Sense = Sense::new(key::DATA_PROTECT, 0x27, 0);
    /// LOGICAL UNIT SOFTWARE WRITE PROTECTED.
    pub const SOFTWARE_WRITE_PROTECTED: Sense = Sense::new(key::DATA_PROTECT, 0x27, 0x02);
    /// MISCOMPARE DURING VERIFY OPERATION.
    pub const MISCOMPARE: Sense = Sense::new(key::MISCOMPARE, 0x1d, 0);
    /// THIRD PARTY DEVICE FAILURE: the device has not copied what it should.
    pub const COPY_FAILED: Sense = Sense::new(key::COPY_ABORTED, 0x0d, 0x01);
    /// INTERNAL TARGET FAILURE.
    pub const INTERNAL_FAILURE: Sense = Sense::new(key::HARDWARE_ERROR, 0x44, 0);

    /// Whether it says this, by code and qualifier.
    #[must_use]
    pub fn is(&self, codes: (u8, u8)) -> bool {
        (self.asc, self.ascq) == codes
    }

    /// INVALID FIELD IN CDB, in byte `byte` from bit `bit` on.
    #[must_use]
    pub const fn in_cdb(byte: u16, bit: u8) -> Sense {
        Sense {
            field: Some(FieldPointer {
                in_cdb: true,
                byte,
                bit: Some(bit),
            }),
            ..Sense::new(key::ILLEGAL_REQUEST, 0x24, 0)
        }
    }

    /// INVALID FIELD IN PARAMETER LIST, in the field that begins at byte `byte`.
    #[must_use]
    pub const fn in_parameters(byte: u16) -> Sense {
        Sense {
            field: Some(FieldPointer {
                in_cdb: false,
                byte,
                bit: None,
            }),
            ..Sense::new(key::ILLEGAL_REQUEST, 0x26, 0)
        }
    }

    /// The same for one bit of such a byte.
    #[must_use]
    pub const fn in_parameter_bit(byte: u16, bit: u8) -> Sense {
        Sense {
            field: Some(FieldPointer {
                in_cdb: false,
                byte,
                bit: Some(bit),
            }),
            ..Sense::in_parameters(byte)
        }
    }

    /// Encodes it, in the descriptor format if `descriptor` and in the fixed one otherwise; says how many bytes there
    /// are.
    pub fn encode(&self, descriptor: bool, out: &mut [u8; MAX_SENSE_BYTES]) -> usize {
        out.fill(0);
        if descriptor {
            self.encode_descriptors(out)
        } else {
            self.encode_fixed(out)
        }
    }

    /// SPC-4, 4.5.3.
    fn encode_fixed(&self, out: &mut [u8; MAX_SENSE_BYTES]) -> usize {
        out[0] = 0x70;
        out[2] = self.key;
        out[7] = 10;
        out[12] = self.asc;
        out[13] = self.ascq;
        // The field has 32 bits; what does not fit is not valid.
        if let Some(Ok(information)) = self.information.map(u32::try_from) {
            out[0] |= 0x80;
            out[3..7].copy_from_slice(&information.to_be_bytes());
        }
        if let Some(specific) = self.key_specific() {
            out[15..18].copy_from_slice(&specific);
        }
        18
    }

    /// SPC-4, 4.5.2.
    fn encode_descriptors(&self, out: &mut [u8; MAX_SENSE_BYTES]) -> usize {
        out[..4].copy_from_slice(&[0x72, self.key, self.asc, self.ascq]);
        let mut len = 8;
        if let Some(information) = self.information {
            out[len..len + 3].copy_from_slice(&[0x00, 0x0a, 0x80]);
            out[len + 4..len + 12].copy_from_slice(&information.to_be_bytes());
            len += 12;
        }
        if let Some(specific) = self.key_specific() {
            out[len..len + 2].copy_from_slice(&[0x02, 0x06]);
            out[len + 4..len + 7].copy_from_slice(&specific);
            len += 8;
        }
        // At most 20 bytes of descriptors.
        out[7] = u8::try_from(len - 8).unwrap_or(0);
        len
    }

    /// The sense-key-specific bytes of an ILLEGAL REQUEST (SPC-4, 4.5.2.4.2): SKSV, C/D, BPV, the bit and the byte.
    fn key_specific(&self) -> Option<[u8; 3]> {
        let FieldPointer { in_cdb, byte, bit } = self.field?;
        let [high, low] = byte.to_be_bytes();
        let bit = bit.map_or(0, |bit| 0x08 | bit & 7);
        Some([0x80 | u8::from(in_cdb) << 6 | bit, high, low])
    }
}
