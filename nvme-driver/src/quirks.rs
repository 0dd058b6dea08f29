//! Devices that depart from the specification, and what the driver does about it: one line and one story each.
//! Learned from what operating systems' drivers have had to do; none of them was at hand to try.
#![forbid(unsafe_code)]

use std::time::Duration;

/// What to do differently. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quirks {
    /// To wait after CC.EN was changed, before CSTS is looked at.
    pub delay_before_ready: Duration,
    /// CAP.MQES lies: ask for no I/O queue of more entries than this. Also stands where MQES says less than two.
    pub queue_entries: Option<u16>,
    /// Write Zeroes is claimed but fails or corrupts: the server does not offer it.
    pub no_write_zeroes: bool,
    /// The controller takes entries of a size that the specification does not know, or worse: it is not used at all.
    pub unusable: Option<&'static str>,
}

/// A device by its PCI identifiers, and what is known of it.
struct Story {
    vendor: u16,
    device: u16,
    /// What people call it, and what happens without the quirk.
    story: &'static str,
    quirks: Quirks,
}

const NONE: Quirks = Quirks {
    delay_before_ready: Duration::ZERO,
    queue_entries: None,
    no_write_zeroes: false,
    unusable: None,
};
const SLOW_REGISTERS: Quirks = Quirks {
    delay_before_ready: Duration::from_millis(2300),
    ..NONE
};
const NO_WRITE_ZEROES: Quirks = Quirks {
    no_write_zeroes: true,
    ..NONE
};

const STORIES: &[Story] = &[
    Story {
        vendor: 0x144d,
        device: 0xa821,
        story: "Samsung PM1725: does not answer the bus for two seconds after CC.EN changes; early firmware says \
                MQES 0, which no controller may, and takes 64 entries",
        quirks: Quirks {
            queue_entries: Some(64),
            ..SLOW_REGISTERS
        },
    },
    Story {
        vendor: 0x144d,
        device: 0xa822,
        story: "Samsung PM1725a: as the PM1725 after CC.EN changes; Write Zeroes ends in errors",
        quirks: Quirks {
            no_write_zeroes: true,
            ..SLOW_REGISTERS
        },
    },
    Story {
        vendor: 0x1c58,
        device: 0x0003,
        story: "HGST Ultrastar SN100: looking at CSTS within two seconds of a change of CC.EN hangs it",
        quirks: SLOW_REGISTERS,
    },
    Story {
        vendor: 0x1c58,
        device: 0x0023,
        story: "Western Digital SN200: as the SN100",
        quirks: SLOW_REGISTERS,
    },
    Story {
        vendor: 0x1c5f,
        device: 0x0540,
        story: "Memblaze PBlaze4: as the SN100",
        quirks: SLOW_REGISTERS,
    },
    Story {
        vendor: 0x1bb1,
        device: 0x0100,
        story: "Seagate Nytro XM1440: as the SN100",
        quirks: SLOW_REGISTERS,
    },
    Story {
        vendor: 0x8086,
        device: 0xf1a5,
        story: "Intel 600p: Write Zeroes is far slower than writing and times out",
        quirks: NO_WRITE_ZEROES,
    },
    Story {
        vendor: 0x106b,
        device: 0x2001,
        story: "Apple S1X (MacBook8,1): loses data and resets with more than one command in a queue",
        quirks: Quirks {
            queue_entries: Some(2),
            ..NONE
        },
    },
    Story {
        vendor: 0x106b,
        device: 0x2005,
        story: "Apple T2: its submission entries have 128 bytes and its queues share identifiers",
        quirks: Quirks {
            unusable: Some(
                "its submission entries have 128 bytes, which the NVMe specification does not know",
            ),
            ..NONE
        },
    },
];

/// What is known of the device with these PCI identifiers, and its story.
#[must_use]
pub fn of_device(vendor: u16, device: u16) -> (Quirks, Option<&'static str>) {
    let known = STORIES
        .iter()
        .find(|known| (known.vendor, known.device) == (vendor, device));
    known.map_or((NONE, None), |known| (known.quirks, Some(known.story)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_device_knows_each_story_once_and_each_does_something() {
        for (i, known) in STORIES.iter().enumerate() {
            assert_eq!(
                of_device(known.vendor, known.device),
                (known.quirks, Some(known.story)),
                "entry {i} is hidden"
            );
            assert_ne!(known.quirks, Quirks::default(), "{}", known.story);
        }
        assert_eq!(of_device(0x1b36, 0x0010), (Quirks::default(), None));
    }
}
