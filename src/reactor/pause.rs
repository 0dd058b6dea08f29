//! The wait between two looks that found nothing: by the instruction with which a core waits at low power for a given
//! time, where it has one, else by `pause`.

use std::time::Duration;

/// How a core waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pause {
    /// WAITPKG, Intel from 2020 on.
    #[cfg(target_arch = "x86_64")]
    Tpause,
    /// MONITORX, AMD from 2015 on.
    #[cfg(target_arch = "x86_64")]
    Mwaitx,
    /// Any core.
    Spin,
}

/// Cycles of a time stamp counter in a nanosecond, about: they run at 1 to 5 GHz.
const CYCLES_PER_NANO: u64 = 2;
/// How long one `pause` takes, at least: 10 ns on old cores, ten times that on new ones.
const SPIN_NANOS: u128 = 20;
/// Longer than anybody asks for. Also bounds the loop of pauses.
const MOST: Duration = Duration::from_micros(100);

impl Pause {
    /// What this core has.
    pub(super) fn of_this_core() -> Pause {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{__cpuid, __cpuid_count};
            if __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ecx & 1 << 5 != 0 {
                return Pause::Tpause;
            }
            if __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & 1 << 29 != 0 {
                return Pause::Mwaitx;
            }
        }
        Pause::Spin
    }

    /// Waits for about `time`, at most 100 us.
    pub(super) fn about(self, time: Duration) {
        let time = time.min(MOST);
        #[cfg(target_arch = "x86_64")]
        // At most 100 us.
        let cycles = u64::try_from(time.as_nanos()).unwrap_or(0) * CYCLES_PER_NANO;
        match self {
            #[cfg(target_arch = "x86_64")]
            Pause::Tpause => tpause(cycles),
            #[cfg(target_arch = "x86_64")]
            Pause::Mwaitx => mwaitx(cycles),
            Pause::Spin => {
                for _ in 0..time.as_nanos() / SPIN_NANOS {
                    std::hint::spin_loop();
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn tpause(cycles: u64) {
    // SAFETY: every x86-64 core has it.
    let until = unsafe { std::arch::x86_64::_rdtsc() } + cycles;
    // SAFETY: the core has WAITPKG (`of_this_core`). TPAUSE ECX waits in the state that bit 0 asks for (C0.1, quick to
    // leave) until the counter reaches EDX:EAX or the system's limit has passed; it touches flags and nothing else.
    unsafe {
        std::arch::asm!(
            ".byte 0x66, 0x0f, 0xae, 0xf1",
            in("ecx") 1,
            in("eax") (until & 0xffff_ffff) as u32,
            in("edx") (until >> 32) as u32,
            options(nostack)
        );
    }
}

#[cfg(target_arch = "x86_64")]
fn mwaitx(cycles: u64) {
    let watched = 0_u64;
    // SAFETY: the core has MONITORX (`of_this_core`). MONITORX watches a line of our stack, which nobody else writes; MWAITX
    // then waits for EBX cycles (ECX bit 1), without a deeper state (EAX F0h). RBX is the compiler's and is put back.
    unsafe {
        std::arch::asm!(
            "xor ecx, ecx",
            "xor edx, edx",
            ".byte 0x0f, 0x01, 0xfa",
            "mov eax, 0xf0",
            "mov ecx, 2",
            "xchg rbx, {cycles}",
            ".byte 0x0f, 0x01, 0xfb",
            "xchg rbx, {cycles}",
            cycles = inout(reg) cycles => _,
            inout("rax") &raw const watched => _,
            out("rcx") _,
            out("rdx") _,
            options(nostack)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn about_returns_soon_whatever_it_is_asked_for() {
        let pause = Pause::of_this_core();
        for time in [0, 1, 10, 1_000_000].map(Duration::from_micros) {
            let start = Instant::now();
            (0..10).for_each(|_| pause.about(time));
            assert!(
                start.elapsed() < Duration::from_secs(1),
                "{pause:?} {time:?}"
            );
        }
    }
}
