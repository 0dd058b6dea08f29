//! Where it was measured: a number never stands without machine and commit.

use std::fs;
use std::process::Command;

use serde::Serialize;

/// What is known of this machine; what cannot be found out is `None`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Environment {
    pub cpu: Option<String>,
    pub cpus: usize,
    pub kernel: Option<String>,
    pub governor: Option<String>,
    pub isolcpus: Option<String>,
    pub huge_pages: Option<u64>,
    pub numa_nodes: usize,
    pub clocksource: Option<String>,
    pub hypervisor: bool,
    /// Of the source tree in whose folder it was started, if it is one.
    pub commit: Option<String>,
    pub version: &'static str,
}

impl Environment {
    #[must_use]
    pub fn of_this_machine() -> Environment {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let line = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let nodes = fs::read_dir("/sys/devices/system/node")
            .into_iter()
            .flatten();
        let node = |name: String| {
            name.strip_prefix("node")
                .is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()))
        };
        Environment {
            cpu: line(&cpuinfo, "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: word("/proc/sys/kernel/osrelease"),
            governor: word("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            isolcpus: word("/sys/devices/system/cpu/isolated"),
            huge_pages: line(&meminfo, "HugePages_Total").and_then(|pages| pages.parse().ok()),
            numa_nodes: nodes
                .flatten()
                .filter(|entry| node(entry.file_name().to_string_lossy().into_owned()))
                .count()
                .max(1),
            clocksource: word("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            hypervisor: line(&cpuinfo, "flags")
                .is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            commit: commit(),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

/// The text of a file that holds one line; an empty one says nothing.
fn word(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn commit() -> Option<String> {
    let output = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_names_the_kernel_and_counts_cpus() {
        let here = Environment::of_this_machine();
        assert!(here.cpus >= 1 && here.numa_nodes >= 1);
        assert!(here.kernel.unwrap().contains('.'));
    }
}
