//! The machine's firmware boots from a disk of the server: SeaBIOS, with its own drivers for virtio-scsi and virtio-blk.

use super::*;

/// What the firmware loads at 7C00h and jumps to, in 16-bit mode with the disk's number in DL.
#[rustfmt::skip]
const CODE: [u8; 36] = [
    0x31, 0xc0,         // xor ax, ax
    0x8e, 0xd8,         // mov ds, ax
    0xfc,               // cld
    0xbe, 0x30, 0x7c,   // mov si, 7C30h: the packet
    0xb4, 0x42,         // mov ah, 42h: extended read
    0xcd, 0x13,         // int 13h
    0x72, 0x0e,         // jc end
    0xbe, 0x00, 0x7e,   // mov si, 7E00h: what was read
    0xba, 0xf8, 0x03,   // mov dx, 3F8h: the serial port
    0xac,               // next: lodsb
    0x84, 0xc0,         // test al, al
    0x74, 0x03,         // jz end
    0xee,               // out dx, al
    0xeb, 0xf8,         // jmp next
    0xb0, 0xfe,         // end: mov al, FEh: reset the machine, which ends QEMU
    0xe6, 0x64,         // out 64h, al
    0xf4,               // halt: hlt
    0xeb, 0xfd,         // jmp halt
    0x00,
];

/// The block with the text.
const TEXT_AT: u8 = 7;

/// A packet of 16 bytes: one block, to 0000h:7E00h, from that LBA on.
const PACKET: [u8; 16] = [
    0x10, 0, 1, 0, 0x00, 0x7e, 0, 0, TEXT_AT, 0, 0, 0, 0, 0, 0, 0,
];

/// As guests speak (`scripts/guest/job.sh`).
const TEXT: &[u8] = b"TANDEM-UP\r\nTANDEM block=read\r\nTANDEM-RESULT ok\r\n\0";

fn bootable_disk(lab: &Lab) {
    let mut blocks = [0; (TEXT_AT as usize + 1) * 512];
    blocks[..CODE.len()].copy_from_slice(&CODE);
    blocks[0x30..0x40].copy_from_slice(&PACKET);
    blocks[510..512].copy_from_slice(&[0x55, 0xaa]);
    let text = usize::from(TEXT_AT) * 512;
    blocks[text..text + TEXT.len()].copy_from_slice(TEXT);
    fs::write(lab.path("disk.img"), blocks).unwrap();
}

#[test]
fn firmware_boots_from_either_kind_of_disk_over_one_queue() {
    let hosts = [
        ("--scsi", "path=vm0.sock,queues=4,lun=0:0:ns1"),
        ("--blk", "path=vm0.sock,queues=4"),
    ];
    for ((option, host), machine) in hosts.into_iter().zip(["--scsi", "--disk"]) {
        let lab = Lab::new("firmware");
        bootable_disk(&lab);
        let device = "model:file,path=disk.img,size=16M";
        let server = Server::start(&lab, &["--device", device, option, host]);
        let more = ["--firmware", machine, "vm0.sock,bootindex=1"];
        let setup = Setup {
            cpus: 1,
            more: &more,
            ..Setup::new(&[], "")
        };
        let facts = Guest::boot(&lab, &setup).ends_well();
        assert_eq!(facts["block"], "read");
        let report = server.end_well();
        // The boot sector, and the block with the text.
        assert_eq!(report.total("reads"), 2, "{report:?}");
        let queues = report.queues.iter();
        let used = queues
            .filter(|queue| queue.get("notifications") > 0)
            .count();
        assert_eq!(used, 1, "{report:?}");
    }
}
