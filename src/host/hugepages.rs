//! Huge pages of 2 MiB: how many there are on each NUMA node, and reserving them where the SSDs are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Host;
use super::effects::Effects;
use super::inventory::HostDevice;

/// The huge pages of one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pool {
    /// `None` where the kernel knows no nodes.
    pub node: Option<u32>,
    pub total: u64,
    pub free: u64,
    #[serde(skip)]
    folder: PathBuf,
}

const SIZE: &str = "hugepages/hugepages-2048kB";

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// By node; one for all where there are no nodes; none where the kernel has no huge pages of this size.
#[must_use]
pub fn pools(host: &Host) -> Vec<Pool> {
    let pool = |node, folder: PathBuf| {
        Some(Pool {
            node,
            total: number(&folder.join("nr_hugepages"))?,
            free: number(&folder.join("free_hugepages"))?,
            folder,
        })
    };
    let nodes = host.sysfs.path("devices/system/node");
    let entries = fs::read_dir(&nodes).into_iter().flatten().flatten();
    let mut pools: Vec<Pool> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let node: u32 = name.strip_prefix("node")?.parse().ok()?;
            pool(Some(node), entry.path().join(SIZE))
        })
        .collect();
    pools.sort_by_key(|pool| pool.node);
    if pools.is_empty() {
        pools.extend(pool(None, host.sysfs.path("kernel/mm").join(SIZE)));
    }
    pools
}

/// What to write where.
fn plan(
    host: &Host,
    pages: u64,
    node: Option<u32>,
    devices: &[HostDevice],
) -> Result<Vec<(String, PathBuf, u64)>, String> {
    let mut pools = pools(host);
    pools.retain(|pool| pool.node.is_some());
    if let Some(wanted) = node {
        if !pools.iter().any(|pool| pool.node == node) {
            let known = pools
                .iter()
                .filter_map(|pool| pool.node)
                .map(|node| node.to_string());
            return Err(format!(
                "there is no NUMA node {wanted} with huge pages of 2 MiB; there is: {}",
                join_or(known, "none")
            ));
        }
        pools.retain(|pool| pool.node == node);
    } else {
        let near: BTreeSet<u32> = devices
            .iter()
            .filter(|device| device.is_bound())
            .filter_map(|device| device.numa_node)
            .collect();
        let is_near = |pool: &Pool| pool.node.is_some_and(|node| near.contains(&node));
        if pools.iter().any(is_near) {
            pools.retain(is_near);
        }
    }
    if pools.is_empty() {
        let path = host.proc.join("sys/vm/nr_hugepages");
        return Ok(vec![("this machine".to_owned(), path, pages)]);
    }
    let count = u64::try_from(pools.len()).map_err(|error| error.to_string())?;
    let shares = (0..count).map(|index| pages / count + u64::from(index < pages % count));
    let named = pools.into_iter().zip(shares).map(|(pool, share)| {
        let name = format!("node {}", pool.node.unwrap_or_default());
        (name, pool.folder.join("nr_hugepages"), share)
    });
    Ok(named.collect())
}

fn join_or(items: impl Iterator<Item = String>, none: &str) -> String {
    match items.collect::<Vec<_>>().join(", ") {
        text if text.is_empty() => none.to_owned(),
        text => text,
    }
}

/// Sets how many huge pages there are: `pages` in all, spread evenly over `node`, or over the nodes of the SSDs that
/// vfio-pci has, or over all. Gives a line for each node, `Err` where the kernel had less to give.
///
/// # Errors
/// When there is no such node.
pub fn reserve(
    host: &Host,
    effects: &mut dyn Effects,
    pages: u64,
    node: Option<u32>,
    devices: &[HostDevice],
) -> Result<Vec<Result<String, String>>, String> {
    let mut lines = Vec::new();
    for (name, path, share) in plan(host, pages, node, devices)? {
        let before = number(&path).unwrap_or_default();
        if let Err(error) = effects.write(&path, &share.to_string()) {
            lines.push(Err(format!(
                "{name}: cannot write {share} to {}: {error}",
                path.display()
            )));
            continue;
        }
        if !effects.acts() {
            continue;
        }
        let now = number(&path);
        lines.push(match now {
            Some(now) if now >= share => Ok(format!("{name}: {now} huge pages of 2 MiB (before: {before})")),
            Some(now) => Err(format!(
                "{name}: asked for {share} huge pages of 2 MiB, the kernel gave {now}: its memory is in use or in \
                 pieces (try again after a reboot, or put hugepages={pages} on the kernel command line)"
            )),
            None => Err(format!("{name}: cannot read {} again", path.display())),
        });
    }
    Ok(lines)
}
