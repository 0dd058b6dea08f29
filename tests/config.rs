//! A configuration written as flags and as a file is the same configuration, and every refusal names what was refused.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use proptest::prelude::*;
use tandem::cli::{Cli, Command};
use tandem::config::{
    BlkOptions, BlockSize, ByteSize, Config, ConfigError, ControllerConfig, CoreId, CoreList,
    DeviceConfig, DeviceOptions, DiskConfig, HostConfig, HostLun, Isolation, LogLevel,
    MAX_DEVICE_NAME, Medium, ModelConfig, OnDeviceLoss, Options, PciTarget, Polling, Socket,
};
use tandem::plan::{Topology, plan};
use tandem::scsi::Initiator;

fn from_toml(text: &str) -> Result<Config, ConfigError> {
    Options::from_toml(text, Path::new("vm.toml"))?.resolve()
}

fn from_flags(flags: &[String]) -> Result<Config, String> {
    let words = ["tandem", "serve"]
        .into_iter()
        .map(str::to_owned)
        .chain(flags.iter().cloned());
    match Cli::try_parse_from(words)
        .map_err(|error| error.to_string())?
        .command
    {
        Command::Serve(args) => args.config().map_err(|error| error.to_string()),
        other => Err(format!("parsed as {other:?}")),
    }
}

const DEVICE: &str = "kind = \"model\"\nmedium = \"ram\"\nsize = \"1G\"\n";

/// A whole file around one `[[device]]` body and some `[[blk]]` bodies.
fn file(device: &str, disks: &[&str]) -> String {
    let disks: String = disks
        .iter()
        .map(|disk| format!("[[blk]]\n{disk}\n"))
        .collect();
    format!("[server]\ncores = \"0\"\n[[device]]\n{device}\n{disks}")
}

fn refusal(text: &str) -> String {
    from_toml(text)
        .expect_err("this configuration makes no sense")
        .to_string()
}

// ---- both forms are one ----

/// The keys of a device or disk, in the order of the struct, values as text.
fn device_keys(device: &DeviceConfig) -> Vec<(&'static str, String)> {
    let model = model_of(device);
    let mut keys = vec![("name", device.name.clone())];
    match &model.medium {
        Medium::Ram { size } | Medium::Null { size } => {
            keys.push(("size", ByteSize(*size).to_string()));
        }
        Medium::File { path, size } => {
            keys.push(("path", path.to_str().expect("generated as text").to_owned()));
            keys.extend(size.map(|size| ("size", ByteSize(size).to_string())));
        }
    }
    keys.extend([
        ("block", model.block_size.to_string()),
        ("namespaces", model.namespaces.to_string()),
        ("queues", model.queue_pairs.to_string()),
        ("mqes", model.max_queue_entries.to_string()),
        (
            "mdts",
            ByteSize(model.max_transfer.unwrap_or(0)).to_string(),
        ),
        (
            "vwc",
            if model.volatile_write_cache {
                "on"
            } else {
                "off"
            }
            .to_owned(),
        ),
        ("latency", format!("{}ns", model.latency.as_nanos())),
        ("jitter", format!("{}us", model.jitter.as_micros())),
        ("serial", model.serial.clone()),
        ("on_device_loss", device.on_device_loss.to_string()),
    ]);
    keys
}

fn disk_keys(disk: &DiskConfig, config: &Config) -> Vec<(&'static str, String)> {
    vec![
        match &disk.socket {
            Socket::Path(path) => ("path", path.to_str().expect("generated as text").to_owned()),
            Socket::Fd(fd) => ("fd", fd.to_string()),
        },
        ("queues", disk.queues.to_string()),
        ("device", config.devices[disk.device].name.clone()),
        ("ns", disk.nsid.to_string()),
        (
            "readonly",
            if disk.readonly { "on" } else { "off" }.to_owned(),
        ),
        ("serial", disk.serial.clone()),
    ]
}

fn model_of(device: &DeviceConfig) -> &ModelConfig {
    match &device.controller {
        ControllerConfig::Model(model) => model,
        ControllerConfig::Pci(target) => panic!("{target} is no model"),
    }
}

fn medium_name(device: &DeviceConfig) -> &'static str {
    match model_of(device).medium {
        Medium::Ram { .. } => "ram",
        Medium::File { .. } => "file",
        Medium::Null { .. } => "null",
    }
}

fn render_flags(config: &Config) -> Vec<String> {
    let join = |keys: Vec<(&str, String)>| {
        let pairs: Vec<String> = keys
            .into_iter()
            .map(|(key, value)| format!("{key}={}", value.replace(',', ",,")))
            .collect();
        pairs.join(",")
    };
    let mut flags = vec![
        "--cores".to_owned(),
        config.cores.to_string(),
        "--poll".to_owned(),
        config.poll.to_string(),
        "--log".to_owned(),
        config.log.to_string(),
    ];
    for device in &config.devices {
        flags.extend([
            "--device".to_owned(),
            format!(
                "model:{},{}",
                medium_name(device),
                join(device_keys(device))
            ),
        ]);
    }
    for disk in &config.disks {
        flags.extend(["--blk".to_owned(), join(disk_keys(disk, config))]);
    }
    flags
}

/// `bare` writes whole numbers and switches as TOML's own types where the value has such a form.
fn render_toml(config: &Config, bare: bool) -> String {
    let table = |keys: Vec<(&str, String)>| {
        let mut text = String::new();
        for (key, value) in keys {
            // A serial number 0012 is no whole number, and -0 no text that anyone wrote.
            let number = value
                .parse::<i64>()
                .ok()
                .filter(|number| number.to_string() == value);
            let value = match (bare, value.as_str(), number) {
                (true, "on", _) if key != "serial" => "true".to_owned(),
                (true, "off", _) if key != "serial" => "false".to_owned(),
                (true, _, Some(number)) => number.to_string(),
                _ => toml::Value::String(value).to_string(),
            };
            text += &format!("{key} = {value}\n");
        }
        text
    };
    let mut text = format!(
        "[server]\ncores = \"{}\"\npoll = \"{}\"\nlog = \"{}\"\n",
        config.cores, config.poll, config.log
    );
    for device in &config.devices {
        text += &format!(
            "[[device]]\nkind = \"model\"\nmedium = \"{}\"\n",
            medium_name(device)
        );
        text += &table(device_keys(device));
    }
    for disk in &config.disks {
        text += "[[blk]]\n";
        text += &table(disk_keys(disk, config));
    }
    text
}

/// Paths and serial numbers with commas, equals signs, quotes and blanks: all legal.
const ODD_TEXT: &str = "[a-z0-9,=\"'\\\\ .#-]{1,20}";

prop_compose! {
    fn any_device()(
        medium in 0..3u8,
        path in ODD_TEXT,
        sized in any::<bool>(),
        units in 1..(1u64 << 30),
        namespaces in 1..=1024u32,
        big_blocks in any::<bool>(),
        queue_pairs in 1..=u16::MAX,
        max_queue_entries in 2..=65536u32,
        mdts_shift in prop::option::of(13..40u32),
        volatile_write_cache in any::<bool>(),
        latency_ns in 0..u64::from(u32::MAX),
        jitter_us in 0..u64::from(u32::MAX),
        serial in ODD_TEXT,
    ) -> ModelConfig {
        let block_size = if big_blocks { BlockSize::B4096 } else { BlockSize::B512 };
        let size = units * u64::from(namespaces) * u64::from(block_size.bytes());
        ModelConfig {
            medium: match medium {
                0 => Medium::File { path: PathBuf::from(path), size: sized.then_some(size) },
                1 => Medium::Ram { size },
                _ => Medium::Null { size },
            },
            block_size,
            namespaces,
            queue_pairs,
            max_queue_entries,
            max_transfer: mdts_shift.map(|shift| 1 << shift),
            volatile_write_cache,
            latency: Duration::from_nanos(latency_ns),
            jitter: Duration::from_micros(jitter_us),
            serial,
        }
    }
}

prop_compose! {
    fn any_disk()(
        by_fd in any::<bool>(),
        path in ODD_TEXT,
        queues in 1..=64u16,
        device in any::<prop::sample::Index>(),
        nsid in any::<prop::sample::Index>(),
        serial in ODD_TEXT,
    ) -> (bool, String, u16, prop::sample::Index, prop::sample::Index, String) {
        (by_fd, path, queues, device, nsid, serial)
    }
}

prop_compose! {
    fn any_config()(
        models in prop::collection::vec(any_device(), 1..4),
        disks in prop::collection::vec(any_disk(), 1..6),
        cores in prop::collection::vec(0..200usize, 1..12),
        adaptive in any::<bool>(),
        log in prop::sample::select(LogLevel::ALL.to_vec()),
    ) -> Config {
        let devices: Vec<DeviceConfig> = models
            .into_iter()
            .enumerate()
            .map(|(index, mut model)| {
                if let Medium::File { path, .. } = &mut model.medium {
                    path.as_mut_os_string().push(format!("{index}")); // two devices never share an image
                }
                let on_device_loss = if index.is_multiple_of(2) { OnDeviceLoss::Error } else { OnDeviceLoss::Hold };
                let name = format!("ssd.{index}");
                DeviceConfig { name, controller: ControllerConfig::Model(model), on_device_loss, isolation: Isolation::Iommu }
            })
            .collect();
        let disks = disks
            .into_iter()
            .enumerate()
            .map(|(index, (by_fd, path, queues, device, nsid, serial))| {
                let device = device.index(devices.len());
                DiskConfig {
                    socket: match by_fd {
                        true => Socket::Fd(3 + i32::try_from(index).expect("small")),
                        false => Socket::Path(PathBuf::from(format!("{path}{index}"))),
                    },
                    queues,
                    device,
                    nsid: 1 + u32::try_from(nsid.index(model_of(&devices[device]).namespaces as usize)).expect("small"),
                    readonly: true, // any of them may then share a namespace
                    serial,
                }
            })
            .collect();
        let poll = if adaptive { Polling::Adaptive } else { Polling::Always };
        Config { devices, disks, hosts: vec![], cores: cores.into_iter().map(CoreId).collect(), poll, state: None, stats: None, admin: None, log }
    }
}

proptest! {
    #[test]
    fn config_written_as_flags_and_as_toml_reads_back_equal(config in any_config()) {
        let flags = render_flags(&config);
        let read = from_flags(&flags);
        prop_assert_eq!(read.as_ref(), Ok(&config), "flags: {:?}", flags);
        for bare in [false, true] {
            let text = render_toml(&config, bare);
            prop_assert_eq!(&from_toml(&text).unwrap(), &config, "file:\n{}", text);
        }
    }

    #[test]
    fn size_printed_and_read_back_is_equal(bytes in any::<u64>(), zeroes in 0..64u32) {
        let size = ByteSize(bytes >> zeroes << zeroes);
        prop_assert_eq!(size.to_string().parse(), Ok(size));
    }

    #[test]
    fn core_list_printed_and_read_back_is_equal(cores in prop::collection::vec(0..8192usize, 1..40)) {
        let list: CoreList = cores.into_iter().map(CoreId).collect();
        prop_assert_eq!(list.to_string().parse(), Ok(list));
    }

    /// Whatever is typed, the answer is a value or an error.
    #[test]
    fn any_text_is_read_or_refused_without_panic(text in ".{0,40}") {
        let _ = text.parse::<BlkOptions>();
        let _ = text.parse::<DeviceOptions>();
        let _ = format!("model:ram,size={text},latency={text}").parse::<DeviceOptions>();
        let _ = text.parse::<CoreList>();
        let _ = from_toml(&text);
    }
}

#[test]
fn shortest_flags_and_shortest_file_give_the_same_defaults() {
    let flags = [
        "--device",
        "model:ram,size=1G",
        "--blk",
        "path=/run/vm0.sock",
        "--cores",
        "0-1",
    ]
    .map(str::to_owned);
    let file = from_toml(
        "server.cores = \"0-1\"\n\
         [[device]]\nkind = \"model\"\nmedium = \"ram\"\nsize = 1073741824\n\
         [[blk]]\npath = \"/run/vm0.sock\"\n",
    )
    .unwrap();
    let expected = Config {
        devices: vec![DeviceConfig {
            name: "d0".to_owned(),
            on_device_loss: OnDeviceLoss::Error,
            isolation: Isolation::Iommu,
            controller: ControllerConfig::Model(ModelConfig {
                medium: Medium::Ram { size: 1 << 30 },
                block_size: BlockSize::B512,
                namespaces: 1,
                queue_pairs: 64,
                max_queue_entries: 1024,
                max_transfer: Some(128 << 10),
                volatile_write_cache: true,
                latency: Duration::ZERO,
                jitter: Duration::ZERO,
                serial: "tandem-d0".to_owned(),
            }),
        }],
        disks: vec![DiskConfig {
            socket: Socket::Path(PathBuf::from("/run/vm0.sock")),
            queues: 1,
            device: 0,
            nsid: 1,
            readonly: false,
            serial: "d0-ns1".to_owned(),
        }],
        hosts: vec![],
        cores: [CoreId(0), CoreId(1)].into_iter().collect(),
        poll: Polling::Always,
        state: None,
        stats: None,
        admin: None,
        log: LogLevel::Info,
    };
    assert_eq!(file, expected);
    assert_eq!(from_flags(&flags), Ok(expected));
}

#[test]
fn unnamed_devices_are_called_by_their_place() {
    let flags = [
        "--device=model:ram,size=1G,name=fast",
        "--device=model:ram,size=1G",
        "--blk=fd=3,device=d1",
        "--cores=0",
    ]
    .map(str::to_owned);
    let config = from_flags(&flags).unwrap();
    assert_eq!(
        config
            .devices
            .iter()
            .map(|device| device.name.as_str())
            .collect::<Vec<_>>(),
        ["fast", "d1"]
    );
    assert_eq!(config.disks[0].device, 1);
}

#[test]
fn default_serials_of_the_longest_device_name_fit_20_bytes() {
    let name = "n".repeat(MAX_DEVICE_NAME);
    let config = from_toml(&file(
        &format!("{DEVICE}namespaces = 1024\nname = \"{name}\""),
        &["path = \"a\"\nns = 1024"],
    ))
    .unwrap();
    assert_eq!(model_of(&config.devices[0]).serial.len(), 20);
    assert_eq!(config.disks[0].serial, format!("{name}-ns1024"));
    assert_eq!(config.disks[0].serial.len(), 20);
}

// ---- what a single value may be ----

#[test]
fn sizes_are_powers_of_1024() {
    for (text, bytes) in [
        ("0", 0),
        ("4096", 4096),
        ("128K", 131_072),
        ("128k", 131_072),
        ("3M", 3_145_728),
        ("1G", 1_073_741_824),
        ("16T", 17_592_186_044_416),
    ] {
        assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
    }
    for text in [
        "",
        "K",
        "+1K",
        "-1",
        "1.5G",
        "1GB",
        "1 G",
        "0x10",
        "18446744073709551616",
        "16777216T",
    ] {
        let error = text.parse::<ByteSize>().unwrap_err().to_string();
        assert!(
            error.starts_with(&format!(
                "`{text}` is not a size: write whole bytes or a K, M, G or T"
            )),
            "{error}"
        );
    }
}

#[test]
fn delays_need_a_unit() {
    for (text, nanos) in [
        ("0", 0),
        ("7ns", 7),
        ("10us", 10_000),
        ("3ms", 3_000_000),
        ("2s", 2_000_000_000),
    ] {
        let options: DeviceOptions = format!("model:ram,size=1G,latency={text}").parse().unwrap();
        assert_eq!(
            model_of(&options.resolve_alone().unwrap()).latency,
            Duration::from_nanos(nanos),
            "{text}"
        );
    }
    for text in ["10", "us", "1.5us", "-1us", "10m", "99999999999s"] {
        let error = format!("model:ram,size=1G,latency={text}")
            .parse::<DeviceOptions>()
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "`latency`: `{text}` is not a duration: write a whole number and its unit ns, us, ms or s, such as 10us"
            )
        );
    }
}

#[test]
fn core_lists_refuse_what_is_no_list() {
    for (text, reason) in [
        (
            "",
            "`` is not a list of cores: write numbers and ranges, such as 0-3,5",
        ),
        (
            "0-",
            "`0-` is not a list of cores: write numbers and ranges, such as 0-3,5",
        ),
        (
            "0,,1",
            "`0,,1` is not a list of cores: write numbers and ranges, such as 0-3,5",
        ),
        (
            "0-99999999",
            "`0-99999999` is not a list of cores: write numbers and ranges, such as 0-3,5",
        ),
        ("3-1", "core range `3-1` runs backwards: write 1-3"),
        ("0-3,2", "core 2 is named twice in `0-3,2`"),
    ] {
        assert_eq!(text.parse::<CoreList>().unwrap_err().to_string(), reason);
    }
}

#[test]
fn core_list_keeps_the_order_written() {
    let list: CoreList = "5,0-2".parse().unwrap();
    assert_eq!(list.as_slice(), [5, 0, 1, 2].map(CoreId));
    assert_eq!(list.to_string(), "5,0-2");
}

// ---- refusals of a file name file, line and field ----

#[test]
fn file_with_unknown_field_names_file_line_and_field() {
    assert_eq!(
        refusal("[server]\ncores = \"0\"\n\n[[blk]]\npath = \"a\"\nqueue = 4\n"),
        "vm.toml:6: unknown field `queue`, expected one of `path`, `fd`, `queues`, `device`, `ns`, `readonly`, `serial`\
         \n  6 | queue = 4"
    );
    assert_eq!(
        refusal("[sever]\ncores = \"0\"\n"),
        "vm.toml:1: unknown field `sever`, expected one of `server`, `device`, `blk`, `scsi`\n  1 | [sever]"
    );
    assert_eq!(
        refusal("[server]\ncore = \"0\"\n"),
        "vm.toml:2: unknown field `core`, expected one of `cores`, `poll`, `state`, `stats`, `admin`, `log`\n  2 | core = \"0\""
    );
}

#[test]
fn file_with_bad_value_names_line_and_value() {
    for (device, line) in [
        (
            "block = 1024",
            "`1024` is not a block size: the controller formats 512 or 4096 bytes",
        ),
        ("queues = 0", "`0` is not a whole number from 1 to 65535"),
        (
            "queues = 65536",
            "`65536` is not a whole number from 1 to 65535",
        ),
        ("mqes = 1", "`1` is not a whole number from 2 to 65536"),
        (
            "namespaces = 1025",
            "`1025` is not a whole number from 1 to 1024",
        ),
        ("vwc = \"yes\"", "`yes` is neither on nor off"),
        (
            "name = \"a b\"",
            "`a b` is not a device name: 1 to 13 of letters, digits, `.`, `_` and `-`",
        ),
        (
            "serial = \"123456789012345678901\"",
            "`123456789012345678901` is not a serial number: 1 to 20 printable ASCII characters (this is 21 bytes)",
        ),
        (
            "latency = 1.5",
            "invalid type: floating point `1.5`, expected a text, a whole number or true/false",
        ),
        ("size = \"2G\"", "duplicate key"),
    ] {
        assert_eq!(
            refusal(&file(&format!("{DEVICE}{device}"), &[])),
            format!("vm.toml:7: {line}\n  7 | {device}")
        );
    }
}

#[test]
fn pci_device_in_every_form_names_its_ssd() {
    let address = PciTarget::Address("0000:5e:00.0".parse().unwrap());
    let serial = PciTarget::Serial("S4EW,NX0R".to_owned());
    for (spec, target, loss) in [
        ("pci:0000:5e:00.0", &address, OnDeviceLoss::Error),
        (
            "pci:5e:00.0,on_device_loss=hold",
            &address,
            OnDeviceLoss::Hold,
        ),
        ("pci:serial=S4EW,,NX0R", &serial, OnDeviceLoss::Error),
        (
            "pci:serial=S4EW,,NX0R,on_device_loss=error",
            &serial,
            OnDeviceLoss::Error,
        ),
    ] {
        let device = spec
            .parse::<DeviceOptions>()
            .unwrap()
            .resolve_alone()
            .unwrap();
        assert_eq!(
            device.controller,
            ControllerConfig::Pci(target.clone()),
            "{spec}"
        );
        assert_eq!(device.on_device_loss, loss, "{spec}");
    }
    let config = from_toml(&file(
        "kind = \"pci\"\naddress = \"5e:00.0\"\n",
        &["path = \"a\"\nns = 700"],
    ))
    .unwrap();
    assert_eq!(config.devices[0].controller, ControllerConfig::Pci(address));
    assert_eq!(config.devices[0].isolation, Isolation::Iommu);
    assert_eq!(
        config.disks[0].nsid, 700,
        "which namespaces there are shows when it is claimed"
    );
}

#[test]
fn device_without_an_iommu_is_asked_for_by_key_alone() {
    for (spec, isolation) in [
        ("pci:5e:00.0", Isolation::Iommu),
        ("pci:5e:00.0,unsafe_noiommu=off", Isolation::Iommu),
        ("pci:5e:00.0,unsafe_noiommu=on", Isolation::UnsafeNone),
    ] {
        let device: DeviceOptions = spec.parse().unwrap();
        assert_eq!(
            device.resolve_alone().unwrap().isolation,
            isolation,
            "{spec}"
        );
    }
    let config = from_toml(&file(
        "kind = \"pci\"\naddress = \"5e:00.0\"\nunsafe_noiommu = true\n",
        &["path = \"a\""],
    ))
    .unwrap();
    assert_eq!(config.devices[0].isolation, Isolation::UnsafeNone);
    let plan = plan(&config, &Topology::from_online_cores([CoreId(0)]));
    let text = plan.unwrap().to_string();
    assert!(
        text.starts_with("device  d0  pci:0000:5e:00.0 through VFIO, UNSAFE: also without an IOMMU; if it is lost: error\n"),
        "{text}"
    );
}

#[test]
fn pci_device_refusals_say_what_to_write() {
    for (spec, reason) in [
        (
            "pci:",
            "`address`: `` is not a PCI address: write it as lspci does, 0000:5e:00.0 or 5e:00.0",
        ),
        (
            "pci:5e.0",
            "`address`: `5e.0` is not a PCI address: write it as lspci does, 0000:5e:00.0 or 5e:00.0",
        ),
        (
            "pci:5e:00.0,unsafe_noiommu=yes",
            "`unsafe_noiommu`: `yes` is neither on nor off",
        ),
        (
            "pci:5e:00.0,on_device_loss=wait",
            "`on_device_loss`: `wait` is neither error nor hold",
        ),
    ] {
        assert_eq!(
            spec.parse::<DeviceOptions>().unwrap_err().to_string(),
            reason,
            "{spec}"
        );
    }
    let choice = "device d0: say which SSD it is with address=0000:5e:00.0 (tandem list shows them) or serial=..., one of both";
    for (spec, reason) in [
        ("pci:5e:00.0,serial=A", choice),
        (
            "pci:5e:00.0,size=1G",
            "device d0: size=... means nothing for a real SSD, which says this itself: drop it",
        ),
        (
            "pci:5e:00.0,queues=4",
            "device d0: queues=... means nothing for a real SSD, which says this itself: drop it",
        ),
        (
            "model:ram,size=1G,unsafe_noiommu=off",
            "device d0: unsafe_noiommu=... means nothing for the embedded controller, which checks every address itself: \
             drop it",
        ),
        (
            "model:ram,size=1G,address=5e:00.0",
            "device d0: address=... means nothing for the embedded controller, which is on no bus: drop it",
        ),
    ] {
        let options = spec.parse::<DeviceOptions>().unwrap();
        assert_eq!(
            options.resolve_alone().unwrap_err().to_string(),
            reason,
            "{spec}"
        );
    }
    assert_eq!(refusal(&file("kind = \"pci\"", &["path = \"a\""])), choice);
    assert_eq!(
        refusal(&file("kind = \"model\"", &["path = \"a\""])),
        "device d0: the embedded controller needs medium = \"ram\", \"file\" or \"null\""
    );
    let pci = "kind = \"pci\"\naddress = \"5e:00.0\"\n";
    let twice = format!("{pci}[[device]]\n{pci}name = \"b\"\n");
    assert_eq!(
        refusal(&file(&twice, &["path = \"a\"\ndevice = \"b\""])),
        "devices d0 and b are one SSD, pci:0000:5e:00.0: describe it once"
    );
}

#[test]
fn file_that_is_absent_is_named() {
    let error = Options::read(Path::new("no/such.toml"))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "cannot read configuration no/such.toml: No such file or directory (os error 2)"
    );
}

// ---- refusals of a flag name the key ----

#[test]
fn blk_spec_refusals_name_the_key() {
    for (spec, reason) in [
        ("", "an option is empty: write key=value,key=value"),
        ("path=a,", "an option is empty: write key=value,key=value"),
        (
            "path=a,readonly",
            "option `readonly` has no value: write readonly=...",
        ),
        ("path=a,path=b", "key `path` is given twice"),
        (
            "path=a,queue=4",
            "unknown field `queue`, expected one of `path`, `fd`, `queues`, `device`, `ns`, `readonly`, `serial`",
        ),
        (
            "path=a,queues=0",
            "`queues`: `0` is not a whole number from 1 to 64",
        ),
        (
            "path=a,queues=65",
            "`queues`: `65` is not a whole number from 1 to 64",
        ),
        (
            "fd=2",
            "`fd`: `2` is not a whole number from 3 to 2147483647",
        ),
        (
            "fd=-1",
            "`fd`: `-1` is not a whole number from 3 to 2147483647",
        ),
        (
            "path=a,ns=0",
            "`ns`: `0` is not a whole number from 1 to 1024",
        ),
        (
            "path=a,readonly=true",
            "`readonly`: `true` is neither on nor off",
        ),
        ("path=", "`path`: `` is not a path"),
    ] {
        assert_eq!(
            spec.parse::<BlkOptions>().unwrap_err().to_string(),
            reason,
            "{spec}"
        );
    }
    let path = "s".repeat(108);
    assert_eq!(
        format!("path={path}")
            .parse::<BlkOptions>()
            .unwrap_err()
            .to_string(),
        format!(
            "`path`: socket path `{path}` is 108 bytes long, a Unix socket takes at most 107: use a shorter directory"
        )
    );
    assert!(
        format!("path={}", "s".repeat(107))
            .parse::<BlkOptions>()
            .is_ok()
    );
}

#[test]
fn device_spec_refusals_name_the_key() {
    for (spec, reason) in [
        (
            "model",
            "`medium`: unknown variant ``, expected one of `ram`, `file`, `null`",
        ),
        (
            "model:rom",
            "`medium`: unknown variant `rom`, expected one of `ram`, `file`, `null`",
        ),
        (
            "",
            "`` is not a kind of device: there are pci:ADDRESS, pci:serial=TEXT, model:ram, model:file and model:null",
        ),
        (
            "nvme:ram",
            "`nvme` is not a kind of device: there are pci:ADDRESS, pci:serial=TEXT, model:ram, model:file and model:null",
        ),
        ("model:ram,size=1G,size=2G", "key `size` is given twice"),
        ("model:ram,medium=file", "key `medium` is given twice"),
    ] {
        assert_eq!(
            spec.parse::<DeviceOptions>().unwrap_err().to_string(),
            reason,
            "{spec}"
        );
    }
}

#[test]
fn spec_with_doubled_comma_holds_a_comma() {
    let flags = [
        "--device=model:file,path=a,,b.img",
        "--blk=path=x,,,,y,serial=p,,q",
        "--cores=0",
    ]
    .map(str::to_owned);
    let config = from_flags(&flags).unwrap();
    assert_eq!(
        model_of(&config.devices[0]).medium,
        Medium::File {
            path: PathBuf::from("a,b.img"),
            size: None
        }
    );
    assert_eq!(config.disks[0].socket, Socket::Path(PathBuf::from("x,,y")));
    assert_eq!(config.disks[0].serial, "p,q");
}

// ---- contradictions between values ----

#[test]
fn config_without_device_disk_or_cores_says_how_to_give_one() {
    let none = Options::default().resolve().unwrap_err().to_string();
    assert!(
        none.starts_with("no device: ") && none.contains("--device model:ram,size=1G"),
        "{none}"
    );
    let no_disk = refusal(&file(DEVICE, &[]));
    assert!(
        no_disk.starts_with("no disk: ") && no_disk.contains("--blk path="),
        "{no_disk}"
    );
    let no_cores = refusal(&file(DEVICE, &["path = \"a\""]).replace("cores = \"0\"", ""));
    assert!(
        no_cores.starts_with("no cores to poll on: ") && no_cores.contains("--cores 0-3,5"),
        "{no_cores}"
    );
}

#[test]
fn device_that_contradicts_itself_is_refused() {
    for (device, reason) in [
        (
            "kind = \"model\"\nmedium = \"ram\"",
            "device d0: model:ram needs size=..., for example size=1G",
        ),
        (
            "kind = \"model\"\nmedium = \"file\"\nsize = \"1G\"",
            "device d0: model:file needs path=..., for example path=disk.img",
        ),
        (
            "kind = \"model\"\nmedium = \"ram\"\npath = \"x\"\nsize = \"1G\"",
            "device d0: model:ram has no path (got x): drop it, or use model:file",
        ),
        (
            "kind = \"model\"\nmedium = \"null\"",
            "device d0: model:null needs size=..., for example size=1T",
        ),
        (
            "kind = \"model\"\nmedium = \"null\"\npath = \"x\"\nsize = \"1G\"",
            "device d0: model:null has no path (got x): drop it, or use model:file",
        ),
        (
            "kind = \"model\"\nmedium = \"ram\"\nsize = 6144\nblock = 4096",
            "device d0: size 6K does not divide into 1 namespace(s) of whole 4096-byte blocks: make it a multiple of \
             4096 bytes",
        ),
        (
            "kind = \"model\"\nmedium = \"ram\"\nsize = 1024\nnamespaces = 3",
            "device d0: size 1K does not divide into 3 namespace(s) of whole 512-byte blocks: make it a multiple of \
             1536 bytes",
        ),
        (
            "kind = \"model\"\nmedium = \"ram\"\nsize = 0",
            "device d0: size 0 does not divide into 1 namespace(s) of whole 512-byte blocks: make it a multiple of 512 \
             bytes",
        ),
        (
            "kind = \"model\"\nmedium = \"ram\"\nsize = \"1G\"\nmdts = \"96K\"",
            "device d0: a transfer limit of 96K cannot be expressed: MDTS is a power of two of at least 8K, or 0 for no \
             limit",
        ),
        (
            "kind = \"model\"\nmedium = \"ram\"\nsize = \"1G\"\nmdts = \"4K\"",
            "device d0: a transfer limit of 4K cannot be expressed: MDTS is a power of two of at least 8K, or 0 for no \
             limit",
        ),
    ] {
        assert_eq!(refusal(&file(device, &["path = \"a\""])), reason);
    }
}

#[test]
fn devices_that_collide_are_refused() {
    let twice = format!("{DEVICE}name = \"x\"\n[[device]]\n{DEVICE}name = \"x\"");
    assert_eq!(
        refusal(&file(&twice, &[])),
        "device x is described twice: give each a name=... of its own"
    );
    let image = "kind = \"model\"\nmedium = \"file\"\npath = ";
    // The same file however it is spelled, as far as spelling alone can tell.
    let shared = format!("{image}\"/img//a\"\n[[device]]\n{image}\"/img/./a\"");
    assert_eq!(
        refusal(&file(&shared, &[])),
        "devices d0 and d1 would both write image /img/./a: give each its own file"
    );
}

#[test]
fn disks_that_collide_are_refused() {
    let device = format!("{DEVICE}namespaces = 2");
    assert_eq!(
        refusal(&file(
            &device,
            &["path = \"/run/a\"", "path = \"/run//a\"\nns = 2"]
        )),
        "socket /run//a is given to two disks or hosts: each needs its own"
    );
    assert_eq!(
        refusal(&file(&device, &["fd = 3", "fd = 3\nns = 2"])),
        "socket fd 3 is given to two disks or hosts: each needs its own"
    );
    // Nor with the sockets where the server itself is spoken to.
    let own = |keys: &str| file(DEVICE, &["path = \"/run/a\""]).replace("[server]", keys);
    for keys in [
        "[server]\nadmin = \"/run/a\"",
        "[server]\nadmin = \"/run/b\"\nstats = \"/run/b\"",
    ] {
        assert!(refusal(&own(keys)).contains("is given to two disks or hosts"));
    }
    let config = from_toml(&own("[server]\nadmin = \"/run/b\"")).unwrap();
    assert_eq!(config.admin.as_deref(), Some(Path::new("/run/b")));
    assert_eq!(
        refusal(&file(DEVICE, &["queues = 1"])),
        "a disk needs either path=... (a socket to create) or fd=... (one already listening): this one has neither"
    );
    assert_eq!(
        refusal(&file(DEVICE, &["path = \"a\"\nfd = 3"])),
        "a disk needs either path=... (a socket to create) or fd=... (one already listening): this one has both"
    );
}

#[test]
fn namespace_served_writable_beside_another_disk_is_refused() {
    for (first, second, writable) in [
        (false, false, "both are"),
        (false, true, "the first is"),
        (true, false, "the second is"),
    ] {
        let disks = [
            format!("path = \"a\"\nreadonly = {first}"),
            format!("path = \"b\"\nreadonly = {second}"),
        ];
        assert_eq!(
            refusal(&file(DEVICE, &[&disks[0], &disks[1]])),
            format!(
                "namespace 1 of device d0 would be served by a and by b, of which {writable} writable: two guests would \
                 destroy each other's file system; make both readonly=on or use another ns=. SCSI hosts \
                 whose guests know of each other share it when each is given a name with initiator=..."
            )
        );
    }
    let read_only = "readonly = true";
    let shared = file(
        DEVICE,
        &[
            &format!("path = \"a\"\n{read_only}"),
            &format!("path = \"b\"\n{read_only}"),
        ],
    );
    assert_eq!(from_toml(&shared).unwrap().disks.len(), 2);
    let apart = file(
        &format!("{DEVICE}namespaces = 2"),
        &["path = \"a\"", "path = \"b\"\nns = 2"],
    );
    assert_eq!(from_toml(&apart).unwrap().disks.len(), 2);
}

#[test]
fn disk_on_unknown_device_or_namespace_is_refused_with_those_there_are() {
    let two = format!("{DEVICE}[[device]]\n{DEVICE}name = \"big\"");
    assert_eq!(
        refusal(&file(&two, &["path = \"a\"\ndevice = \"d1\""])),
        "disk a: there is no device d1 (devices: d0, big)"
    );
    assert_eq!(
        refusal(&file(&two, &["path = \"a\""])),
        "disk a: say which device it is on with device=... (devices: d0, big)"
    );
    assert_eq!(
        refusal(&file(
            &format!("{DEVICE}namespaces = 2"),
            &["path = \"a\"\nns = 3"]
        )),
        "disk a: device d0 has namespaces 1 to 2, not 3"
    );
}

// ---- what the documentation shows ----

#[test]
fn readme_shows_the_plan_of_the_demo_configuration() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = Options::read(&root.join("config/demo.toml"))
        .and_then(Options::resolve)
        .unwrap();
    let plan = plan(&config, &Topology::from_online_cores([CoreId(0)]))
        .unwrap()
        .to_string();
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    assert!(
        readme.contains(&format!("```text\n{plan}```")),
        "README.md should show this plan:\n{plan}"
    );
}

/// The flags that config/demo.toml gives as its equal are its equal.
#[test]
fn demo_file_and_the_flags_in_its_comment_give_the_same_config() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/demo.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let command = text
        .lines()
        .find_map(|line| line.strip_prefix("#   tandem serve --device "))
        .unwrap();
    let flags: Vec<String> = ["--device"]
        .into_iter()
        .chain(command.split_whitespace())
        .map(str::to_owned)
        .collect();
    assert_eq!(
        from_flags(&flags),
        Ok(Options::read(&path).unwrap().resolve().unwrap())
    );
}

// ---- SCSI hosts ----

/// A whole file around one `[[scsi]]` body.
fn host_file(body: &str) -> String {
    format!(
        "{}[[scsi]]\n{body}\n",
        file(&format!("{DEVICE}namespaces = 4"), &[])
    )
}

#[test]
fn scsi_host_as_flags_and_as_a_file_is_the_same() {
    let place = |target, lun, nsid| HostLun {
        target,
        lun,
        device: 0,
        nsid,
    };
    let expected = HostConfig {
        socket: Socket::Path("/run/a,b.sock".into()),
        queues: 4,
        device: 0,
        readonly: true,
        luns: vec![place(0, 0, 1), place(1, 0, 2), place(255, 16383, 4)],
        initiator: Initiator::new("iqn.2025-01.internal.tandem:run.a-b.sock").unwrap(),
        named: false,
    };
    let body = "path = \"/run/a,b.sock\"\nqueues = 4\ndevice = \"d0\"\nreadonly = true\n\
                lun = [\"0:0:ns1\", \"1:0:ns2\", \"255:16383:ns4\"]";
    let as_file = from_toml(&host_file(body)).unwrap();
    assert_eq!(as_file.hosts, [expected]);
    assert!(as_file.disks.is_empty());
    let spec = "lun=0:0:ns1,path=/run/a,,b.sock,queues=4,lun=1:0:ns2,device=d0,readonly=on,lun=255:16383:ns4";
    let flags = [
        "--cores",
        "0",
        "--device",
        "model:ram,size=1G,namespaces=4",
        "--scsi",
        spec,
    ];
    assert_eq!(from_flags(&flags.map(str::to_owned)).unwrap(), as_file);
    // The shortest.
    let short = from_toml(&host_file("fd = 3\nlun = [\"0:0:ns1\"]")).unwrap();
    assert_eq!((short.hosts[0].queues, short.hosts[0].readonly), (1, false));
}

#[test]
fn units_of_a_host_name_their_devices_or_are_on_its_own() {
    let hosts = |spec: &str| {
        let flags = [
            "--cores",
            "0",
            "--device",
            "model:ram,size=1G",
            "--device",
            "model:ram,size=1G,namespaces=2,name=fast-1",
            "--device",
            "model:null,size=1G",
            "--scsi",
            spec,
        ];
        from_flags(&flags.map(str::to_owned)).map(|config| config.hosts)
    };
    let devices = |spec: &str| {
        let host = hosts(spec).unwrap().remove(0);
        let of_luns: Vec<(usize, u32)> =
            host.luns.iter().map(|lun| (lun.device, lun.nsid)).collect();
        (host.device, of_luns, host.other_devices())
    };
    assert_eq!(
        devices("fd=3,device=d2,lun=0:0:ns1,lun=0:1:fast-1:ns2,lun=0:2:d0:ns1,lun=0:3:fast-1:ns1"),
        (2, vec![(2, 1), (1, 2), (0, 1), (1, 1)], vec![1, 0])
    );
    // Each names its own: the first one's is the host's.
    assert_eq!(
        devices("fd=3,lun=0:0:fast-1:ns2,lun=0:1:d2:ns1"),
        (1, vec![(1, 2), (2, 1)], vec![2])
    );
    assert_eq!(
        devices("fd=3,device=d0,lun=0:0:d0:ns1").2,
        Vec::<usize>::new()
    );
    for (spec, reason) in [
        ("fd=3,lun=0:0:d0:ns1,lun=0:1:ns1", "say which device"),
        ("fd=3,lun=0:0:d7:ns1", "there is no device d7"),
        (
            "fd=3,lun=0:0:d0:ns2",
            "device d0 has namespaces 1 to 1, not 2",
        ),
        (
            "fd=3,lun=0:0:d0:ns1,lun=0:1:d0:ns1",
            "would be served by fd 3 and by fd 3",
        ),
        (
            "fd=3,lun=0:0:d0:ns1,lun=0:0:fast-1:ns1",
            "target 0 has LUN 0 twice",
        ),
        ("fd=3,lun=0:0::ns1", "`0:0::ns1` is not a place"),
        ("fd=3,lun=0:0:d0:d1:ns1", "`0:0:d0:d1:ns1` is not a place"),
        ("fd=3,lun=0:d0:ns1", "`0:d0:ns1` is not a place"),
    ] {
        let error = hosts(spec).unwrap_err().to_string();
        assert!(error.contains(reason), "{spec}: {error}");
    }
}

#[test]
fn scsi_host_refusals_say_what_is_wrong_with_which() {
    for (body, reason) in [
        (
            "fd = 3",
            "host fd 3: no logical unit: name at least one, for example lun=0:0:ns1",
        ),
        ("fd = 3\nlun = []", "no logical unit"),
        (
            "fd = 3\nlun = [\"0:1:ns1\", \"0:1:ns2\"]",
            "host fd 3: target 0 has LUN 1 twice",
        ),
        (
            "fd = 3\nlun = [\"0:0:ns1\", \"0:1:ns1\"]",
            "would be served by fd 3 and by fd 3, of which both are writable",
        ),
        (
            "fd = 3\nlun = [\"0:0:ns5\"]",
            "has namespaces 1 to 4, not 5",
        ),
        (
            "fd = 3\ndevice = \"d7\"\nlun = [\"0:0:ns1\"]",
            "there is no device d7",
        ),
        ("lun = [\"0:0:ns1\"]", "this one has neither"),
        (
            "fd = 3\nlun = [\"0:0:1\"]",
            "`0:0:1` is not a place for a logical unit: write TARGET:LUN:nsN",
        ),
        (
            "fd = 3\nlun = [\"256:0:ns1\"]",
            "`256:0:ns1` is not a place",
        ),
        (
            "fd = 3\nlun = [\"0:16384:ns1\"]",
            "`0:16384:ns1` is not a place",
        ),
        ("fd = 3\nlun = [\"0:0:ns0\"]", "`0:0:ns0` is not a place"),
        (
            "fd = 3\nserial = \"x\"\nlun = [\"0:0:ns1\"]",
            "unknown field `serial`",
        ),
    ] {
        let text = refusal(&host_file(body));
        assert!(text.contains(reason), "{body}: {text}");
    }
    let shared = format!(
        "{}[[blk]]\nfd = 4\nns = 2\n",
        host_file("fd = 3\nlun = [\"0:0:ns2\"]")
    );
    assert!(refusal(&shared).contains("would be served by fd 4 and by fd 3"));
    let one_socket = format!(
        "{}[[blk]]\nfd = 3\nns = 2\n",
        host_file("fd = 3\nlun = [\"0:0:ns1\"]")
    );
    assert!(refusal(&one_socket).contains("given to two"));
    let twice = ["--scsi", "fd=3,fd=4,lun=0:0:ns1"].map(str::to_owned);
    assert!(
        from_flags(&twice)
            .unwrap_err()
            .contains("key `fd` is given twice")
    );
}

/// Two hosts with namespace 1, with these lines more.
fn sharing(first: &str, second: &str) -> Result<Config, ConfigError> {
    let lun = "lun = [\"0:0:ns1\"]";
    let first = format!("path = \"/run/a\"\n{lun}\n{first}");
    let second = format!("path = \"/run/b\"\n{lun}\n{second}");
    from_toml(&format!("{}[[scsi]]\n{second}\n", host_file(&first)))
}

#[test]
fn scsi_hosts_share_a_namespace_when_both_are_named() {
    let name = |name: &str| format!("initiator = \"{name}\"");
    let shared = sharing(&name("VM0"), &name("iqn.2001-04.com.example:vm1")).unwrap();
    let names: Vec<&str> = shared
        .hosts
        .iter()
        .map(|host| host.initiator.name())
        .collect();
    assert_eq!(
        names,
        [
            "iqn.2025-01.internal.tandem:vm0",
            "iqn.2001-04.com.example:vm1"
        ]
    );
    let refused = |first: &str, second: &str| sharing(first, second).unwrap_err().to_string();
    for (first, second) in [("", ""), (&name("vm0")[..], ""), ("", &name("vm1")[..])] {
        let text = refused(first, second);
        assert!(
            text.contains("would be served by /run/a and by /run/b"),
            "{text}"
        );
    }
    let text = refused(&name("vm0"), &name("iqn.2025-01.internal.tandem:vm0"));
    assert!(
        text.contains(
            "twice to initiator iqn.2025-01.internal.tandem:vm0, by /run/a and by /run/b"
        ),
        "{text}"
    );
    // Nobody can destroy anything: no names are needed, but they must differ.
    let read = "readonly = true\n";
    assert!(sharing(read, read).is_ok());
    let same = format!("{read}{}", name("x"));
    assert!(refused(&same, &same).contains("twice to initiator"));
    // A guest without reservations of its own respects nobody's.
    let with_blk = format!(
        "{}[[blk]]\nfd = 4\n",
        host_file(&format!("fd = 3\nlun = [\"0:0:ns1\"]\n{}", name("x")))
    );
    assert!(refusal(&with_blk).contains("would be served by fd 4 and by fd 3"));
    for (name, reason) in [
        ("", "it is empty"),
        ("vm_0", "'_' is no character of a name"),
        (
            &"x".repeat(200)[..],
            "it has 228 bytes, and an iSCSI name at most 223",
        ),
    ] {
        let text = refusal(&host_file(&format!(
            "fd = 3\nlun = [\"0:0:ns1\"]\ninitiator = \"{name}\""
        )));
        assert!(text.contains(reason), "{text}");
    }
}

#[test]
fn plan_of_a_scsi_host_shows_units_and_request_queues() {
    let places: Vec<String> = (0..9)
        .map(|at| format!("\"{at}:{}:ns{}\"", at * 40, at + 1))
        .collect();
    let text = format!(
        "[server]\ncores = \"0-1\"\n[[device]]\n{DEVICE}namespaces = 16\n\
         [[blk]]\nfd = 3\nns = 16\n[[scsi]]\npath = \"/run/s\"\nqueues = 3\nlun = [{}]\n",
        places.join(", ")
    );
    let config = from_toml(&text).unwrap();
    let plan = plan(&config, &Topology::from_online_cores([0, 1].map(CoreId))).unwrap();
    assert_eq!(plan.devices[0].virtqueues, 4);
    let text = plan.to_string();
    let (_, after) = text.split_once("serial \"d0-ns16\"\n").unwrap();
    assert_eq!(
        after,
        "  1 virtqueue, queue@core: 0@0\n\
         host    /run/s\n\
         \x20 initiator iqn.2025-01.internal.tandem:run.s\n\
         \x20 d0, 9 logical units, read-write; target:LUN, namespace:\n\
         \x20   0:0 ns1, 1:40 ns2, 2:80 ns3, 3:120 ns4, 4:160 ns5, 5:200 ns6, 6:240 ns7, 7:280 ns8\n\
         \x20   8:320 ns9\n\
         \x20 3 request queues, virtqueue@core: 2@1 3@0 4@1; control and event queue are polled with the first\n\
         core    0    polls 2 virtqueues\n\
         core    1    polls 2 virtqueues\n"
    );
}
