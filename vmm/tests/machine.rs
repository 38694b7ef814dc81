//! A machine on real KVM: it counts, pauses, freezes by its own deadline, and goes on elsewhere.

mod common;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::{COUNTER, counting, kvm, late, margin, permit, with_code};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm::clock;
use vmm::devices::MachineEvent;
use vmm::kvm::dirty::DirtyLog;
use vmm::machine::SaveError;

const LONG: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_runs_only_after_a_permit_and_stops_in_milliseconds() {
    if !kvm("a_guest_runs_only_after_a_permit_and_stops_in_milliseconds") {
        return;
    }
    let counting = counting(1, false);
    let gate = counting.machine.gate();
    assert!(!gate.is_open());
    assert_eq!(counting.counter.last.load(Ordering::SeqCst), 0);
    gate.run(permit(LONG)).unwrap();
    let mut slowest = Duration::ZERO;
    let mut seen = 0;
    for _ in 0..50 {
        counting.counter.wait_beyond(seen);
        let begun = Instant::now();
        let (again, stopped_ns) = gate.stop_vcpus().unwrap();
        slowest = slowest.max(begun.elapsed());
        assert!(stopped_ns <= clock::monotonic_ns());
        seen = counting.counter.last.load(Ordering::SeqCst);
        gate.run(again.expect("the permit comes back")).unwrap();
    }
    assert_eq!(
        counting.counter.skipped.load(Ordering::SeqCst),
        0,
        "no count is lost or doubled"
    );
    assert!(
        slowest < Duration::from_millis(500),
        "a pause took {slowest:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_guest_does_not_move_and_its_memory_and_registers_agree() {
    if !kvm("a_paused_guest_does_not_move_and_its_memory_and_registers_agree") {
        return;
    }
    let counting = counting(1, false);
    counting.machine.gate().run(permit(LONG)).unwrap();
    counting.counter.wait_beyond(100);
    assert!(matches!(counting.machine.save(), Err(SaveError::Running)));
    counting.machine.gate().close().unwrap();
    let said = counting.counter.last.load(Ordering::SeqCst);
    let first = counting.machine.save().unwrap();
    let in_memory: u64 = counting
        .machine
        .memory()
        .read_obj(GuestAddress(COUNTER))
        .unwrap();
    assert!(
        in_memory == said || in_memory == said + 1,
        "{in_memory} in memory, {said} said"
    );
    let second = counting.machine.save().unwrap();
    assert_eq!(
        format!("{:?}", first.devices),
        format!("{:?}", second.devices)
    );
    assert_eq!(counting.counter.last.load(Ordering::SeqCst), said);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_freezes_at_its_deadline_by_itself_and_thaws_by_a_permit_alone() {
    if !kvm("a_guest_freezes_at_its_deadline_by_itself_and_thaws_by_a_permit_alone") {
        return;
    }
    let mut counting = counting(1, false);
    let gate = counting.machine.gate().clone();
    let begun = Instant::now();
    gate.run(permit(Duration::from_millis(300))).unwrap();
    counting.counter.wait_beyond(0);
    let lapsed = tokio::time::timeout(LONG, counting.lapses.recv())
        .await
        .unwrap()
        .unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(300));
    let late = late(lapsed.stopped.unwrap(), gate.deadline_ns());
    assert!(late < margin(), "frozen {late:?} after its deadline");
    assert!(!gate.is_open());
    let frozen_at = counting.counter.last.load(Ordering::SeqCst);
    gate.extend(clock::boottime_ns() + LONG.as_nanos() as u64, 0)
        .unwrap();
    assert!(!gate.is_open(), "an extension does not thaw");
    assert!(counting.machine.gate().vcpus().are_parked());
    assert_eq!(counting.counter.last.load(Ordering::SeqCst), frozen_at);
    gate.run(permit(LONG)).unwrap();
    counting.counter.wait_beyond(frozen_at);
    assert_eq!(counting.counter.skipped.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_vcpu_enters_the_guest_past_its_deadline_though_the_gates_thread_is_late() {
    if !kvm("no_vcpu_enters_the_guest_past_its_deadline_though_the_gates_thread_is_late") {
        return;
    }
    let mut counting = counting(1, false);
    let gate = counting.machine.gate().clone();
    // The gate's thread is held up in telling of a first lapse.
    let hold = counting.lapse_hold.clone();
    let held = hold.lock().await;
    gate.run(permit(Duration::from_millis(50))).unwrap();
    counting.lapses.recv().await.unwrap();
    let frozen_at = counting.counter.last.load(Ordering::SeqCst);
    gate.run(permit(Duration::from_millis(300))).unwrap();
    counting.counter.wait_beyond(frozen_at);
    while clock::boottime_ns() < gate.deadline_ns() + 50_000_000 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(gate.is_open(), "nobody has closed it");
    let stopped_at = counting.counter.last.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(counting.counter.last.load(Ordering::SeqCst), stopped_at);
    drop(held);
    counting.lapses.recv().await.unwrap();
    assert!(!gate.is_open());
    // It did not lose its way: a permit lets it go on.
    gate.run(permit(LONG)).unwrap();
    counting.counter.wait_beyond(stopped_at);
    assert_eq!(counting.counter.skipped.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn that_a_vcpu_does_not_stop_is_known_within_the_margin() {
    if !kvm("that_a_vcpu_does_not_stop_is_known_within_the_margin") {
        return;
    }
    let counting = counting(1, false);
    let gate = counting.machine.gate().clone();
    gate.run(permit(LONG)).unwrap();
    counting.counter.stuck.store(true, Ordering::SeqCst);
    while counting.counter.inside.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    let stopped = gate.close();
    counting.counter.stuck.store(false, Ordering::SeqCst);
    let waited = stopped.unwrap_err().waited;
    assert!(waited < margin(), "it was waited for {waited:?}");
    // Told to stop, it does as soon as it can.
    gate.close().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_that_nobody_acted_on_goes_where_the_machine_goes() {
    if !kvm("a_reset_that_nobody_acted_on_goes_where_the_machine_goes") {
        return;
    }
    let first = counting(1, false);
    first.machine.gate().run(permit(LONG)).unwrap();
    first.counter.wait_beyond(100);
    first.machine.events().tell(MachineEvent::Reset);
    first.machine.gate().close().unwrap();
    let state = first.machine.save().unwrap();
    let bytes = state.to_bytes();
    let mut memory = vec![0; 16 << 20];
    let start = GuestAddress(0);
    first
        .machine
        .memory()
        .read_slice(&mut memory, start)
        .unwrap();
    drop(first);

    let mut second = counting(1, true);
    second.machine.memory().write_slice(&memory, start).unwrap();
    let state = vmm::state::MachineState::from_bytes(&bytes).unwrap();
    second.machine.restore(&state).unwrap();
    assert!(second.events.try_recv().is_err(), "not before it runs");
    second.machine.gate().run(permit(LONG)).unwrap();
    let event = tokio::time::timeout(LONG, second.events.recv()).await;
    assert_eq!(event.unwrap(), Some(MachineEvent::Reset));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_lease_does_not_lapse() {
    if !kvm("a_renewed_lease_does_not_lapse") {
        return;
    }
    let mut counting = counting(1, false);
    let gate = counting.machine.gate().clone();
    gate.run(permit(Duration::from_millis(400))).unwrap();
    gate.extend(clock::boottime_ns() + LONG.as_nanos() as u64, 0)
        .unwrap();
    let lapse = tokio::time::timeout(Duration::from_millis(900), counting.lapses.recv()).await;
    assert!(lapse.is_err(), "it lapsed: {lapse:?}");
    assert!(gate.is_open());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_machine_goes_on_in_another_with_its_clock_ahead() {
    if !kvm("a_saved_machine_goes_on_in_another_with_its_clock_ahead") {
        return;
    }
    let first = counting(1, false);
    first.machine.gate().run(permit(LONG)).unwrap();
    first.counter.wait_beyond(1000);
    first.machine.gate().close().unwrap();
    let state = first.machine.save().unwrap();
    let clock_before = first.machine.vm().clock_ns().unwrap();
    let bytes = state.to_bytes();
    let mut memory = vec![0; 16 << 20];
    first
        .machine
        .memory()
        .read_slice(&mut memory, GuestAddress(0))
        .unwrap();
    let count = first.counter.last.load(Ordering::SeqCst);
    drop(first);

    let second = counting(1, true);
    second
        .machine
        .memory()
        .write_slice(&memory, GuestAddress(0))
        .unwrap();
    let state = vmm::state::MachineState::from_bytes(&bytes).unwrap();
    second.machine.restore(&state).unwrap();
    assert!(
        second.machine.vm().clock_ns().unwrap() >= clock_before,
        "the guest's clock went back"
    );
    second.machine.gate().run(permit(LONG)).unwrap();
    second.counter.wait_beyond(count + 1000);
    assert_eq!(second.counter.skipped.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_guest_and_devices_wrote_stays_dirty_until_it_is_cleared() {
    if !kvm("what_guest_and_devices_wrote_stays_dirty_until_it_is_cleared") {
        return;
    }
    const DEVICE_PAGE: u64 = 2000;
    const GUEST_PAGE: u64 = COUNTER / 4096;
    let dirty = |words: &[u64], page: u64| words[page as usize / 64] >> (page % 64) & 1 == 1;
    let counting = counting(1, false);
    let log = DirtyLog::begin(counting.machine.vm().clone()).unwrap();
    // All is dirty at first; then nothing is.
    let first = log.fetch(0).unwrap();
    assert!(first.iter().all(|word| *word == u64::MAX));
    log.clear(0, 0, &first).unwrap();
    assert!(log.fetch(0).unwrap().iter().all(|word| *word == 0));

    counting
        .machine
        .memory()
        .write_obj(7u64, GuestAddress(DEVICE_PAGE * 4096))
        .unwrap();
    counting.machine.gate().run(permit(LONG)).unwrap();
    counting.counter.wait_beyond(10);
    counting.machine.gate().close().unwrap();
    for _ in 0..3 {
        let words = log.fetch(0).unwrap();
        assert!(dirty(&words, DEVICE_PAGE) && dirty(&words, GUEST_PAGE));
    }
    // One word is cleared, the other stays.
    let words = log.fetch(0).unwrap();
    let word = DEVICE_PAGE / 64;
    log.clear(0, word * 64, &words[word as usize..=word as usize])
        .unwrap();
    let words = log.fetch(0).unwrap();
    assert!(!dirty(&words, DEVICE_PAGE) && dirty(&words, GUEST_PAGE));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_before_a_log_begins_is_not_in_it() {
    if !kvm("what_was_written_before_a_log_begins_is_not_in_it") {
        return;
    }
    let counting = counting(1, false);
    let memory = counting.machine.memory();
    memory.write_obj(7u64, GuestAddress(2000 * 4096)).unwrap();
    let log = DirtyLog::begin(counting.machine.vm().clone()).unwrap();
    // The first round sends every page and asks for none.
    let pages = memory.iter().next().unwrap().len() / 4096;
    log.clear(0, 0, &vec![u64::MAX; pages as usize / 64])
        .unwrap();
    assert!(log.fetch(0).unwrap().iter().all(|word| *word == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_is_refused_by_a_machine_of_another_shape() {
    if !kvm("a_state_is_refused_by_a_machine_of_another_shape") {
        return;
    }
    let one = counting(1, false);
    let state = one.machine.save().unwrap();
    let two = counting(2, true);
    assert!(
        two.machine
            .restore(&state)
            .unwrap_err()
            .to_string()
            .contains("vCPUs")
    );
    let mut other = state.clone();
    other.devices[0].kind = "adder".into();
    let target = counting(1, true);
    assert!(
        target
            .machine
            .restore(&other)
            .unwrap_err()
            .to_string()
            .contains("adder")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_faults_is_told_of() {
    if !kvm("a_guest_that_faults_is_told_of") {
        return;
    }
    // A jump to where nothing is mapped; without an IDT that is a triple fault.
    const FAULT: &[u8] = &[0x48, 0xc7, 0xc0, 0x00, 0x00, 0x00, 0x80, 0xff, 0xe0];
    let mut faulting = with_code(FAULT, 1, false);
    faulting.machine.gate().run(permit(LONG)).unwrap();
    let event = tokio::time::timeout(LONG, faulting.events.recv())
        .await
        .unwrap();
    assert_eq!(event, Some(MachineEvent::ShutDown));
}

#[tokio::test(flavor = "multi_thread")]
async fn several_vcpus_stop_together_and_application_processors_wait_elsewhere_too() {
    if !kvm("several_vcpus_stop_together_and_application_processors_wait_elsewhere_too") {
        return;
    }
    let first = counting(4, false);
    first.machine.gate().run(permit(LONG)).unwrap();
    first.counter.wait_beyond(100);
    first.machine.gate().close().unwrap();
    assert!(first.machine.gate().vcpus().are_parked());
    let state = first.machine.save().unwrap();
    assert_eq!(state.cpus.len(), 4);
    let mut memory = vec![0; 16 << 20];
    first
        .machine
        .memory()
        .read_slice(&mut memory, GuestAddress(0))
        .unwrap();
    let count = first.counter.last.load(Ordering::SeqCst);
    drop(first);

    let second = counting(4, true);
    second
        .machine
        .memory()
        .write_slice(&memory, GuestAddress(0))
        .unwrap();
    second.machine.restore(&state).unwrap();
    second.machine.gate().run(permit(LONG)).unwrap();
    second.counter.wait_beyond(count + 100);
    second.machine.gate().close().unwrap();
    assert_eq!(second.counter.skipped.load(Ordering::SeqCst), 0);
    // Those that nobody woke have stood still: what they were is what they are.
    let cpu = |state: &vmm::state::MachineState, index: usize| {
        let cpu = serde_json::to_value(&state.cpus[index]).unwrap();
        ["mp_state", "regs", "sregs"].map(|part| cpu[part].clone())
    };
    let later = second.machine.save().unwrap();
    assert_ne!(cpu(&later, 0), cpu(&state, 0));
    for index in 1..4 {
        assert_eq!(cpu(&later, index), cpu(&state, index), "vCPU {index}");
    }
}
