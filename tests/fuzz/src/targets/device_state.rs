//! A saved machine, as it arrives behind its memory: read, and put into devices that then go on working.
//!
//! ```text
//!  first byte   0       the whole document
//!               else    one device's state (its place is this byte, less one), then what the guest does
//! ```

use vmm::state::{DeviceState, Hex, MachineState, STATE_VERSION};

use crate::bench::{Bench, MEMORY_MIB};
use crate::guest::{act, driver, register, request};
use crate::input::{Input, field};
use crate::runtime::block_on_alone;
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "device_state",
    run,
    seeds,
    input_bytes_max: 8192,
    // As for `guest_io`: the devices go on with whatever queues the state gives them.
    memory: MemoryBound {
        base: 300 << 20,
        each: 64,
    },
};

fn run(data: &[u8]) {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    block_on_alone(async {
        match choice.checked_sub(1) {
            None => document(rest).await,
            Some(place) => one(usize::from(place), Input(rest)).await,
        }
    });
}

async fn document(text: &[u8]) {
    let Ok(state) = MachineState::from_bytes(text) else {
        return;
    };
    let again = MachineState::from_bytes(&state.to_bytes());
    assert_eq!(again.ok().as_ref(), Some(&state), "another machine");
    let Some(bench) = Bench::new() else { return };
    for (device, saved) in bench.devices.iter().zip(&state.devices) {
        let _ = device.restore(saved.version, &saved.state.0);
    }
    act(&bench, Input(&[])).await;
}

async fn one(place: usize, mut input: Input<'_>) {
    let Some(bench) = Bench::new() else { return };
    let device = &bench.devices[place % bench.devices.len()];
    if device.restore(device.version(), input.field()).is_err() {
        return;
    }
    let saved = device
        .save()
        .expect("a device that does not work can be saved");
    let again = device.restore(device.version(), &saved);
    assert_eq!(again, Ok(()), "what was saved is not taken back");
    bench.devices.iter().for_each(|device| device.resume());
    act(&bench, input).await;
}

/// The devices as they are saved while a driver has set the disk up.
fn saved() -> Vec<DeviceState> {
    block_on_alone(async {
        let Some(bench) = Bench::new() else {
            return Vec::new();
        };
        act(&bench, Input(&driver())).await;
        let state = |device: &std::sync::Arc<dyn vmm::devices::Migratable>| DeviceState {
            kind: device.kind(),
            version: device.version(),
            state: Hex(device.save().unwrap_or_default()),
        };
        bench.devices.iter().map(state).collect()
    })
}

fn seeds() -> Vec<Vec<u8>> {
    let devices = saved();
    let mut seeds: Vec<Vec<u8>> = (1u8..)
        .zip(&devices)
        .map(|(place, device)| {
            let steps = [request(1, 1, 512), register(0x70, 0), vec![4, 0xf8, 3, 1]].concat();
            [vec![place], field(&device.state.0), steps].concat()
        })
        .collect();
    let machine = MachineState {
        version: STATE_VERSION,
        memory_mib: MEMORY_MIB,
        cpus: Vec::new(),
        vm: Default::default(),
        devices,
        saved_at_realtime_ns: 5,
        ended: None,
    };
    seeds.push([vec![0], machine.to_bytes()].concat());
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_states_that_their_devices_take_back() {
        let saved = saved();
        assert_eq!(saved.len(), 4);
        block_on_alone(async {
            let bench = Bench::new().unwrap();
            for (device, state) in bench.devices.iter().zip(&saved) {
                assert_eq!(device.kind(), state.kind);
                assert_eq!(device.restore(state.version, &state.state.0), Ok(()));
            }
        });
    }
}
