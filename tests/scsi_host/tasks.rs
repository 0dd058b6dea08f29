//! Task management that ends commands at the device, by NVMe's Abort. There is no keeper in these tests: they send the Aborts,
//! and say when.

use tandem::control::recovery::abort_commands;

use super::*;

/// Response codes (virtio 1.2, 5.6.6.1.1 and 5.6.6.2).
const ABORTED: u8 = 2;
const FUNCTION_SUCCEEDED: u8 = 10;

const ABORT_TASK: u32 = 0;
const ABORT_TASK_SET: u32 = 1;
const CLEAR_TASK_SET: u32 = 3;
const I_T_NEXUS_RESET: u32 = 4;
const LOGICAL_UNIT_RESET: u32 = 5;
const QUERY_TASK: u32 = 6;
const QUERY_TASK_SET: u32 = 7;

/// Turns in which everything has happened that happens by itself.
const A_WHILE: u32 = 200;

impl Host {
    /// Offers a command with a tag.
    fn send_tagged(&mut self, lun: [u8; 8], tag: u64, cdb: &[u8], data: (&[u8], u32)) -> u16 {
        let head = self.next_head;
        self.header(head, lun, cdb);
        let (slot, at) = (Self::slot(head), DATA + u64::from(head) * 0x2_0000);
        self.requests.write(Gpa(slot + 8), &tag.to_le_bytes());
        let mut chain = vec![(slot, self.header_bytes(), 0)];
        let (out, data_in) = data;
        if !out.is_empty() {
            self.requests.write(Gpa(at), out);
            chain.push((at, out.len() as u32, 0));
        }
        chain.push((slot + 0x400, self.response_bytes(), WRITE));
        if data_in > 0 {
            chain.push((at, data_in, WRITE));
        }
        self.offer(&chain)
    }

    /// A read that the device never ends by itself.
    fn hangs(&mut self, lun: [u8; 8], tag: u64) -> u16 {
        assert!(self.model.hang_next(io_opcode::READ));
        let head = self.send_tagged(lun, tag, &read_10(0, 1), (&[], 512));
        self.turn();
        head
    }

    fn tagged_task(function: u32, lun: [u8; 8], tag: u64) -> Vec<u8> {
        let mut request = Self::task(function, lun);
        request[16..].copy_from_slice(&tag.to_le_bytes());
        request
    }

    fn wants(&mut self, function: u32, lun: [u8; 8], tag: u64) {
        self.ask(&Self::tagged_task(function, lun, tag), 1);
    }

    /// Nothing is answered, on either queue.
    #[track_caller]
    fn waits(&mut self) {
        for _ in 0..A_WHILE {
            self.turn();
            assert_eq!(self.control.take_used(), None, "the function was answered");
            assert_eq!(self.requests.take_used(), None, "a command came back");
        }
    }

    /// The keeper's part.
    #[track_caller]
    fn sends_aborts(&mut self, count: usize) {
        let health = self.poller.as_ref().unwrap().health();
        assert_eq!(health.aborts().asked().count(), count);
        abort_commands(&self.device, self.pair, &health).unwrap();
        assert_eq!(health.aborts().asked().count(), 0);
    }

    #[track_caller]
    fn comes_back_as(&mut self, sent: u16, reply: Reply) {
        let (head, used_len) = self.comes_back();
        assert_eq!((head, self.reply(head, used_len)), (sent, reply));
    }

    #[track_caller]
    fn function_is(&mut self, response: u8) {
        let (len, bytes) = self.answered();
        assert_eq!((len, bytes[0]), (1, response));
    }
}

/// How a read of one block comes back that was ended.
fn ended(response: u8) -> Reply {
    Reply {
        response,
        residual: 512,
        ..good(0, 0)
    }
}

#[test]
fn abort_task_ends_the_command_with_its_tag_at_the_device_and_no_other() {
    let mut host = Host::new();
    let (first, second) = (host.hangs(FIRST, 7), host.hangs(FIRST, 8));
    host.wants(ABORT_TASK, FIRST, 7);
    // It may still write to the guest's memory: it was not answered, and nor is the function.
    host.waits();
    host.sends_aborts(1);
    host.comes_back_as(first, ended(ABORTED));
    host.function_is(OK);
    assert_eq!(host.model.io_counters().aborted, 1);
    // The tag of a command for another unit, or of none.
    for (lun, tag) in [(SECOND, 8), (FIRST, 7), (FIRST, 9)] {
        host.wants(ABORT_TASK, lun, tag);
        host.function_is(OK);
    }
    host.waits();
    // New commands go on beside it.
    assert_eq!(host.command(FIRST, &read_10(1, 1), &[], 512), good(0, 512));
    host.wants(ABORT_TASK, FIRST, 8);
    host.waits();
    host.sends_aborts(1);
    host.comes_back_as(second, ended(ABORTED));
    host.function_is(OK);
    assert_eq!(host.model.io_counters().aborted, 2);
    host.finish();
}

#[test]
fn query_finds_commands_that_are_there_and_leaves_them() {
    let mut host = Host::new();
    let head = host.hangs(FIRST, 7);
    for (function, lun, tag, response) in [
        (QUERY_TASK, FIRST, 7, FUNCTION_SUCCEEDED),
        (QUERY_TASK, FIRST, 8, OK),
        (QUERY_TASK, SECOND, 7, OK),
        (QUERY_TASK_SET, FIRST, 0, FUNCTION_SUCCEEDED),
        (QUERY_TASK_SET, SECOND, 0, OK),
    ] {
        host.wants(function, lun, tag);
        host.function_is(response);
    }
    host.waits();
    host.wants(ABORT_TASK_SET, FIRST, 0);
    host.waits();
    host.sends_aborts(1);
    host.comes_back_as(head, ended(ABORTED));
    host.function_is(OK);
    for function in [QUERY_TASK, QUERY_TASK_SET] {
        host.wants(function, FIRST, 7);
        host.function_is(OK);
    }
    host.finish();
}

#[test]
fn command_that_ends_before_its_abort_keeps_its_identifier_from_the_next_one() {
    let config = ModelConfig {
        latency: Duration::from_millis(20),
        ..ModelConfig::default()
    };
    let mut host = Host::with(config, Sizes::DEFAULT, (32, 96));
    let head = host.send_tagged(FIRST, 7, &read_10(0, 1), (&[], 512));
    host.turn();
    host.wants(ABORT_TASK, FIRST, 7);
    host.comes_back_as(head, good(0, 512));
    host.function_is(OK);
    // The Abort comes late, while the next command is at the device.
    let head = host.send_tagged(FIRST, 8, &read_10(0, 1), (&[], 512));
    host.turn();
    host.sends_aborts(1);
    host.comes_back_as(head, good(0, 512));
    assert_eq!(host.model.io_counters().aborted, 0);
    // Every identifier is there again, after a while.
    for _ in 0..5000 {
        host.turn();
    }
    let load = host.poller.as_ref().unwrap().load();
    assert_eq!(load.outstanding, 0);
    host.finish();
}

#[test]
fn commands_in_the_ring_are_ended_too_and_those_of_other_units_are_not() {
    let mut host = Host::new();
    let hung = host.hangs(FIRST, 1);
    // Not fetched yet when the function comes.
    assert!(host.model.hang_next(io_opcode::READ));
    let waiting = host.send_tagged(FIRST, 2, &read_10(0, 1), (&[], 512));
    let other = host.send_tagged(SECOND, 3, &read_10(0, 1), (&[], 512));
    host.wants(I_T_NEXUS_RESET, FIRST, 0);
    host.comes_back_as(other, good(0, 512));
    host.waits();
    host.sends_aborts(2);
    let mut back = [host.comes_back(), host.comes_back()];
    back.sort_unstable();
    for ((head, len), sent) in back.into_iter().zip([hung, waiting]) {
        assert_eq!((head, host.reply(head, len)), (sent, ended(RESET)));
    }
    host.function_is(OK);
    assert_eq!(host.command(FIRST, &[0; 6], &[], 0), check(6, 0x29, 7, 0));
    assert_eq!(host.command(SECOND, &[0; 6], &[], 0), good(0, 0));
    host.finish();
}

#[test]
fn abort_cuts_a_request_of_several_commands_short() {
    let config = ModelConfig {
        mdts_bytes: Some(8 << 10),
        queues: 1,
        ..ModelConfig::default()
    };
    let mut host = Host::with(config, Sizes::DEFAULT, (32, 96));
    // COMPARE AND WRITE: what it reads hangs, so it never writes. It holds the blocks until that has ended.
    assert!(host.model.hang_next(io_opcode::READ));
    let cdb = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
    let data = [[0; 512], [7; 512]].concat();
    let compare = host.send_tagged(FIRST, 1, &cdb, (&data, 0));
    host.turn();
    host.waits();
    host.wants(ABORT_TASK, FIRST, 1);
    host.waits();
    host.sends_aborts(1);
    host.comes_back_as(
        compare,
        Reply {
            residual: 1024,
            ..ended(ABORTED)
        },
    );
    host.function_is(OK);
    assert_eq!(host.medium(1, 0, 512), [0; 512]);
    // The lock is free.
    let mut again = host.command(FIRST, &cdb, &data, 0);
    assert_eq!(again, good(0, 0));
    assert_eq!(host.medium(1, 0, 512), [7; 512]);
    again = host.command(FIRST, &write_10(0, 1), &[8; 512], 0);
    assert_eq!(again, good(0, 0));
    host.finish();
}

/// Two hosts of one device, both polled by the test.
fn two_hosts() -> (Storage, Host, Host) {
    let storage = Storage::new(ModelConfig::default());
    let host = |number| Host::of(&storage, number, Sizes::DEFAULT, (32, 96));
    let (a, b) = (host(0), host(1));
    (storage, a, b)
}

#[test]
fn reset_of_a_unit_ends_the_commands_of_every_host_and_tells_them() {
    for (function, own, attention) in [
        (LOGICAL_UNIT_RESET, RESET, (0x29, 0x03)),
        (CLEAR_TASK_SET, ABORTED, (0x2f, 0x00)),
    ] {
        let (storage, mut a, mut b) = two_hosts();
        let (own_head, other) = (a.hangs(FIRST, 1), b.hangs(FIRST, 1));
        let elsewhere = b.hangs(SECOND, 2);
        a.wants(function, FIRST, 0);
        a.waits();
        b.waits();
        a.sends_aborts(1);
        a.comes_back_as(own_head, ended(own));
        // Not yet: the other host's may still reach blocks.
        a.waits();
        b.sends_aborts(1);
        b.comes_back_as(other, ended(RESET));
        b.turn();
        a.function_is(OK);
        let (asc, ascq) = attention;
        assert_eq!(b.command(FIRST, &[0; 6], &[], 0), check(6, asc, ascq, 0));
        assert_eq!(b.command(FIRST, &[0; 6], &[], 0), good(0, 0));
        if function == LOGICAL_UNIT_RESET {
            assert_eq!(a.command(FIRST, &[0; 6], &[], 0), check(6, 0x29, 3, 0));
        }
        assert_eq!(a.command(FIRST, &[0; 6], &[], 0), good(0, 0));
        // Another unit's is still there; a function of one initiator is not about another one's.
        a.wants(ABORT_TASK_SET, SECOND, 0);
        a.function_is(OK);
        a.wants(QUERY_TASK_SET, SECOND, 0);
        a.function_is(OK);
        b.waits();
        b.wants(ABORT_TASK, SECOND, 2);
        b.waits();
        b.sends_aborts(1);
        b.comes_back_as(elsewhere, ended(ABORTED));
        b.function_is(OK);
        drop(storage);
        a.finish();
        b.finish();
    }
}

#[test]
fn nothing_is_aborted_twice_and_a_reset_of_the_device_forgets_the_rest() {
    let mut host = Host::new();
    let head = host.hangs(FIRST, 7);
    host.wants(ABORT_TASK, FIRST, 7);
    host.waits();
    // The device is lost before anybody sends the Abort.
    host.poller.as_mut().unwrap().suspend(Service::Fail);
    let health = host.poller.as_ref().unwrap().health();
    assert_eq!(health.aborts().asked().count(), 0);
    let (back, used_len) = host.comes_back();
    let reply = host.reply(back, used_len);
    // As every command that no device ends any more.
    assert_eq!(
        (back, reply.status, reply.sense),
        (head, 2, Some((0x0b, 0x0b, 8)))
    );
    host.function_is(OK);
    drop(host.recall());
}
