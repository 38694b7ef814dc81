//! The table: what stands at a limit is let in, what is beyond it is refused by name.

use super::*;

const GUEST: Boot = Boot::SelfCheck {
    working_set_mib: 4,
    dirty_mib_s: 0,
};

type Machine<'a> = Measures<'a, std::iter::Copied<std::slice::Iter<'a, u64>>>;

fn measures<'a>(boot: &'a Boot, disk_bytes: &'a [u64]) -> Machine<'a> {
    Measures {
        memory_mib: 64,
        vcpus: 1,
        boot,
        disk_bytes: disk_bytes.iter().copied(),
        nics: 0,
    }
}

fn linux(kernel: &str, cmdline: &str) -> Boot {
    Boot::Linux {
        kernel: kernel.into(),
        initrd: None,
        cmdline: cmdline.into(),
    }
}

#[test]
fn a_machine_at_a_limit_is_let_in_and_one_beyond_it_is_refused_by_name() {
    let plain = linux("/k", "");
    let one = |memory_mib, vcpus, disks: usize, nics| {
        check(&Measures {
            memory_mib,
            vcpus,
            nics,
            ..measures(&plain, &vec![1 << 20; disks])
        })
        .map_err(|error| error.field)
    };
    let refused = |field: &str| Err(field.to_owned());
    for (answer, expected) in [
        (one(16, 1, 0, 0), Ok(())),
        (one(15, 1, 0, 0), refused("memory_mib")),
        (one(1 << 20, 32, 8, 1), Ok(())),
        (one((1 << 20) + 1, 1, 0, 0), refused("memory_mib")),
        (one(64, 0, 0, 0), refused("vcpus")),
        (one(64, 33, 0, 0), refused("vcpus")),
        (one(64, 64, 0, 0), refused("vcpus")),
        (one(64, 1, 1, 8), Ok(())),
        (one(64, 1, 9, 0), refused("disks")),
        (one(64, 1, 0, 9), refused("disks")),
        (one(64, 1, 5, 5), refused("disks")),
    ] {
        assert_eq!(answer, expected);
    }
}

#[test]
fn a_guest_that_its_machine_has_no_room_for_is_refused() {
    let guest = |working_set_mib| Boot::SelfCheck {
        working_set_mib,
        dirty_mib_s: 0,
    };
    for (boot, memory_mib, field) in [
        (guest(0), 64, Some("boot.working_set_mib")),
        (guest(60), 64, None),
        (guest(61), 64, Some("boot.working_set_mib")),
        (guest(64 * 1024), 1 << 20, None),
        (guest(64 * 1024 + 1), 1 << 20, Some("boot.working_set_mib")),
        (linux("k", ""), 64, Some("boot")),
        (linux(&"/".repeat(PATH_BYTES_MAX + 1), ""), 64, Some("boot")),
        (linux("/k", &"x".repeat(CMDLINE_BYTES_MAX)), 64, None),
        (
            linux("/k", &"x".repeat(CMDLINE_BYTES_MAX + 1)),
            64,
            Some("boot.cmdline"),
        ),
        (linux("/k", "a\nb"), 64, Some("boot.cmdline")),
    ] {
        let machine = Measures {
            memory_mib,
            ..measures(&boot, &[])
        };
        let refused = check(&machine).err().map(|error| error.field);
        assert_eq!(refused.as_deref(), field, "{boot:?}");
    }
}

#[test]
fn a_disk_of_the_wrong_size_is_refused() {
    let plain = linux("/k", "");
    for (boot, bytes, right) in [
        (&plain, 64 << 10, true),
        (&plain, (64 << 10) - 512, false),
        (&plain, (64 << 10) + 1, false),
        (&plain, 64 << 40, true),
        (&plain, (64 << 40) + 512, false),
        (&GUEST, 64 << 10, false),
        (&GUEST, SELF_CHECK_DISK_BYTES_MIN, true),
    ] {
        let answer = check(&measures(boot, &[bytes]));
        let field = answer.as_ref().err().map(|error| error.field.as_str());
        assert_eq!(field, (!right).then_some("disks[0]"), "{bytes} {boot:?}");
    }
    // The guest uses its first disk alone.
    assert_eq!(check(&measures(&GUEST, &[1 << 20, 64 << 10])), Ok(()));
}

#[test]
fn a_refusal_says_what_would_be_right() {
    let machine = Measures {
        vcpus: 64,
        ..measures(&GUEST, &[])
    };
    assert_eq!(
        check(&machine).unwrap_err().to_string(),
        "vcpus: 64 virtual processors; use 1 to 32 virtual processors"
    );
}

#[test]
fn a_mac_address_is_six_bytes_of_one_interface() {
    let mac = [0x52, 0x54, 0, 0x12, 0x34, 0xff];
    assert_eq!(parse_mac("52:54:00:12:34:ff"), Some(mac));
    for wrong in [
        "",
        "52:54:00:12:34",
        "52:54:00:12:34:56:78",
        "5254:00:12:34:56",
        "+2:54:00:12:34:56",
        // A group's address.
        "53:54:00:12:34:56",
        "ff:ff:ff:ff:ff:ff",
    ] {
        assert_eq!(parse_mac(wrong), None, "{wrong}");
    }
}
