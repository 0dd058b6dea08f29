//! A fixed load over the data path in one process, for an instruction counter: `scripts/dev bench` runs it under
//! callgrind. Everything that is counted happens inside [`turn`]; of that, the embedded controller's part happens inside
//! its `Slot::service`.
//!
//! `datapath BATCH ROUNDS [packed]`: in each round the guest has BATCH new 4 KiB reads in one virtqueue, a split one if
//! nothing else is said, and there are as many turns as it takes to get them to the device. BATCH 0 counts turns that find
//! nothing to do.

#[allow(clippy::unwrap_used)] // as in the tests that it belongs to
#[path = "../tests/common/rig.rs"]
mod rig;

use nvme_model::ModelConfig;
use rig::{GuestSetup, Rig};
use tandem::datapath::Poll;
use tandem::sim::SimRequest;
use tandem::virtio::blk::{request_type, status};
use tandem::virtio::virtqueue::RingLayout;

const BYTES: u32 = 4096;
const DISK: u64 = 64 << 20;
/// Turns before anything is counted: buffers touched, tables warm.
const WARM_UP: u64 = 64;

/// Requests that a poller takes in one turn, at most.
const PER_TURN: u64 = 16;

/// What is counted.
#[inline(never)]
fn turn(poller: &mut dyn Poll) -> bool {
    poller.turn()
}

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|arg| arg.parse().ok());
    let (batch, turns) = (numbers.next().unwrap_or(32), numbers.next().unwrap_or(1000));
    let mut rig = Rig::new(ModelConfig {
        size: DISK,
        queues: 1,
        ..ModelConfig::default()
    });
    let packed = std::env::args().any(|arg| arg == "packed");
    let setup = GuestSetup {
        layout: if packed {
            RingLayout::Packed
        } else {
            RingLayout::Split
        },
        max_data: BYTES,
        ..GuestSetup::default()
    };
    let mut guest = rig.add_guest(&setup);
    assert!(guest.indirect && batch <= u64::from(guest.queue_size));
    guest.driver.disable_signals();
    let mut sector = 0;
    let mut completed = 0;
    for now in 0..turns + WARM_UP + 1 {
        // The last turn takes nothing new, so that all ends.
        for _ in 0..if now == turns + WARM_UP { 0 } else { batch } {
            // One descriptor each, as Linux sends them: an indirect table of header, data, status.
            let mut request = SimRequest::new(request_type::IN, sector, BYTES, true);
            request.direct = Some(0);
            sector = (sector + 8 * 7919) % (DISK / 512);
            let head = guest.driver.submit(&request, &[]);
            assert!(head.is_some(), "the ring is full");
        }
        guest.driver.publish();
        for _ in 0..batch.div_ceil(PER_TURN).max(1) {
            if now < WARM_UP {
                rig.turn();
            } else {
                turn(&mut *rig.pollers[0]);
            }
        }
        while let Some(completion) = guest.driver.poll_used() {
            assert_eq!(completion.status, status::OK);
            completed += 1;
        }
    }
    assert_eq!(completed, batch * (turns + WARM_UP));
    // Reads only: what the last one returned is what is there.
    assert_eq!(rig.medium(512), [0; 512]);
    rig.finish();
}
