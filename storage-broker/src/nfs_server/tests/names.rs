//! Names: made once, found, listed in pieces, moved and removed; handles of what is gone.

use std::collections::BTreeSet;

use super::*;
use futures::future::join_all;
use nfs3_types::nfs3::{createhow3, createverf3, sattr3};

async fn create(
    client: &NfsClient,
    whom: Credential,
    name: &str,
    how: createhow3,
) -> (Status, Option<FileHandle>) {
    let arguments = nfs3::CREATE3args {
        where_: entry(client.root(), name),
        how,
    };
    let (status, mut reply) = call(client, whom, NFS_PROGRAM::NFSPROC3_CREATE, &arguments).await;
    if status != Status::NFS3_OK {
        return (status, None);
    }
    assert!(reply.bool().unwrap(), "the reply carries the handle");
    (
        status,
        Some(crate::nfs::client::file_handle(&mut reply).unwrap()),
    )
}

#[tokio::test]
async fn of_many_who_create_a_name_at_once_one_succeeds() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    for round in 0..10 {
        let name = format!("disk{round}");
        let racing = (0..16).map(|_| {
            create(
                &client,
                user(7, 7),
                &name,
                createhow3::GUARDED(sattr3::default()),
            )
        });
        let results = join_all(racing).await;
        let won = results
            .iter()
            .filter(|(status, _)| *status == Status::NFS3_OK)
            .count();
        let lost = results
            .iter()
            .filter(|(status, _)| *status == Status::NFS3ERR_EXIST)
            .count();
        assert_eq!((won, lost), (1, 15));
    }
    let own = std::fs::read_dir(root.path().join(".baton-nfs")).unwrap();
    let left: Vec<_> = own.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "no temporary file stays: {left:?}");
}

#[tokio::test]
async fn an_exclusive_create_may_be_asked_again_by_its_asker_only() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let me = user(7, 7);
    let with = |verifier| createhow3::EXCLUSIVE(createverf3([verifier; 8]));
    let first = create(&client, me, "lock", with(1)).await;
    assert_eq!(first.0, Status::NFS3_OK);
    assert_eq!(create(&client, me, "lock", with(1)).await, first);
    assert_eq!(
        create(&client, me, "lock", with(2)).await.0,
        Status::NFS3ERR_EXIST
    );
    server.shutdown().await;
    let server = serve(&root).await;
    let client = connect(&server).await;
    assert_eq!(create(&client, me, "lock", with(1)).await, first);
}

#[tokio::test]
async fn an_unchecked_create_takes_what_is_there_and_cuts_it_if_the_caller_may_write() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let me = user(7, 7);
    let sized = |size| sattr3 {
        mode: nfs3::Nfs3Option::Some(0o600),
        size: nfs3::Nfs3Option::Some(size),
        ..sattr3::default()
    };
    let (_, first) = create(&client, me, "file", createhow3::UNCHECKED(sized(100))).await;
    let (_, again) = create(&client, me, "file", createhow3::UNCHECKED(sized(10))).await;
    assert_eq!(first, again);
    assert_eq!(
        client
            .getattr(me, &first.unwrap())
            .await
            .unwrap()
            .size_bytes,
        10
    );
    let (status, _) = create(&client, user(8, 8), "file", createhow3::UNCHECKED(sized(0))).await;
    assert_eq!(status, Status::NFS3ERR_ACCES);
}

async fn list(client: &NfsClient, directory: &FileHandle, bytes_max: u32) -> Vec<String> {
    let mut names = Vec::new();
    let mut cookie = 0;
    loop {
        let arguments = nfs3::READDIRPLUS3args {
            dir: wire_handle(directory),
            cookie,
            cookieverf: nfs3::cookieverf3::default(),
            dircount: bytes_max,
            maxcount: bytes_max,
        };
        let (status, reply) = call(
            client,
            user(7, 7),
            NFS_PROGRAM::NFSPROC3_READDIRPLUS,
            &arguments,
        )
        .await;
        assert_eq!(status, Status::NFS3_OK);
        assert!(reply.0.len() <= bytes_max as usize);
        let mut bytes: &[u8] = &reply.0;
        let (page, _): (nfs3::READDIRPLUS3resok<'static>, _) =
            nfs3_types::xdr_codec::Unpack::unpack(&mut bytes).unwrap();
        for entry in page.reply.entries.into_inner() {
            cookie = entry.cookie;
            names.push(String::from_utf8(entry.name.0.to_vec()).unwrap());
        }
        if page.reply.eof {
            return names;
        }
    }
}

#[tokio::test]
async fn a_directory_is_listed_whole_in_small_pieces_without_the_servers_own_files() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let mut expected = BTreeSet::from([".".to_owned(), "..".to_owned()]);
    for number in 0..40 {
        let name = format!("file-with-a-longer-name-{number}");
        client
            .create(user(7, 7), client.root(), &name, mode(0o600))
            .await
            .unwrap();
        expected.insert(name);
    }
    // Put there behind the server's back: a file is shown, a symbolic link is not.
    std::fs::write(root.path().join("put"), b"there").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.path().join("link")).unwrap();
    expected.insert("put".to_owned());
    for bytes_max in [600, 2000, 1 << 20] {
        let names = list(&client, client.root(), bytes_max).await;
        assert_eq!(names.len(), expected.len());
        assert_eq!(names.into_iter().collect::<BTreeSet<_>>(), expected);
    }
    for name in [".baton-nfs", "link"] {
        assert!(
            client
                .lookup(user(7, 7), client.root(), name)
                .await
                .is_err(),
            "{name}"
        );
    }
    assert!(
        client
            .lookup(user(7, 7), client.root(), "put")
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn names_that_lead_elsewhere_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let long = "x".repeat(256);
    for name in ["", ".", "..", "a/b", "/etc", "nul\0", ".baton-nfs", &long] {
        let made = client
            .create(user(7, 7), client.root(), name, mode(0o600))
            .await;
        assert!(made.is_err(), "{name:?}");
        assert!(
            client
                .remove(user(7, 7), client.root(), name)
                .await
                .is_err(),
            "{name:?}"
        );
    }
    assert_eq!(
        client
            .lookup(user(7, 7), client.root(), "..")
            .await
            .unwrap(),
        *client.root()
    );
}

#[tokio::test]
async fn a_handle_of_a_removed_file_is_stale_even_if_its_inode_is_used_again() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let me = user(7, 7);
    let gone = client
        .create(me, client.root(), "a", mode(0o600))
        .await
        .unwrap();
    client
        .write(me, &gone, 0, &Bytes::from_static(b"x"), Stable::UNSTABLE)
        .await
        .unwrap();
    client.remove(me, client.root(), "a").await.unwrap();
    for number in 0..5 {
        client
            .create(me, client.root(), &number.to_string(), mode(0o600))
            .await
            .unwrap();
        let stale = client.getattr(me, &gone).await.unwrap_err();
        assert_eq!(stale.status(), Some(Status::NFS3ERR_STALE));
        let stale = client
            .write(me, &gone, 0, &Bytes::from_static(b"y"), Stable::UNSTABLE)
            .await;
        assert_eq!(stale.unwrap_err().status(), Some(Status::NFS3ERR_STALE));
    }
    server.shutdown().await;
    let server = serve(&root).await;
    let client = connect(&server).await;
    let stale = client.getattr(me, &gone).await.unwrap_err();
    assert_eq!(stale.status(), Some(Status::NFS3ERR_STALE));
    let foreign = FileHandle(Bytes::from_static(&[9; 32]));
    assert_eq!(
        client.getattr(me, &foreign).await.unwrap_err().status(),
        Some(Status::NFS3ERR_STALE)
    );
    let short = FileHandle(Bytes::from_static(&[9; 7]));
    assert_eq!(
        client.getattr(me, &short).await.unwrap_err().status(),
        Some(Status::NFS3ERR_BADHANDLE)
    );
}

#[tokio::test]
async fn a_renamed_file_keeps_its_handle_and_replaces_what_was_there() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let me = user(7, 7);
    let rename = |from: FileHandle, name: &'static str, to: FileHandle, new: &'static str, whom| {
        let client = &client;
        async move {
            let arguments = nfs3::RENAME3args {
                from: entry(&from, name),
                to: entry(&to, new),
            };
            call(client, whom, NFS_PROGRAM::NFSPROC3_RENAME, &arguments)
                .await
                .0
        }
    };
    let top = client.root().clone();
    let directory = client.mkdir(me, &top, "d", 0o755).await.unwrap();
    let file = client.create(me, &top, "a", mode(0o600)).await.unwrap();
    let replaced = client
        .create(me, &directory, "b", mode(0o600))
        .await
        .unwrap();
    let stranger = user(8, 8);
    let status = rename(top.clone(), "a", top.clone(), "c", stranger).await;
    assert_eq!(status, Status::NFS3ERR_PERM, "the root is sticky");
    let status = rename(top.clone(), "a", directory.clone(), "b", me).await;
    assert_eq!(status, Status::NFS3_OK);
    assert_eq!(client.lookup(me, &directory, "b").await.unwrap(), file);
    assert!(client.lookup(me, &top, "a").await.is_err());
    assert!(client.getattr(me, &replaced).await.is_err());
    client
        .write(me, &file, 0, &Bytes::from_static(b"x"), Stable::FILE_SYNC)
        .await
        .unwrap();

    let full = nfs3::RMDIR3args {
        object: entry(&top, "d"),
    };
    let rmdir = NFS_PROGRAM::NFSPROC3_RMDIR;
    assert_eq!(
        call(&client, me, rmdir, &full).await.0,
        Status::NFS3ERR_NOTEMPTY
    );
    let as_file = client.remove(me, &top, "d").await.unwrap_err();
    assert_eq!(as_file.status(), Some(Status::NFS3ERR_ISDIR));
    let into_itself = rename(top.clone(), "d", directory.clone(), "e", me).await;
    assert_eq!(into_itself, Status::NFS3ERR_INVAL);
    client.remove(me, &directory, "b").await.unwrap();
    assert_eq!(call(&client, me, rmdir, &full).await.0, Status::NFS3_OK);
    assert!(client.getattr(me, &directory).await.is_err());
    server.shutdown().await;
}

#[tokio::test]
async fn a_directory_is_searched_listed_and_changed_by_its_own_bits() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let (me, other) = (user(7, 7), user(8, 8));
    let directory = client.mkdir(me, client.root(), "d", 0o701).await.unwrap();
    client
        .create(me, &directory, "a", mode(0o600))
        .await
        .unwrap();
    client.lookup(other, &directory, "a").await.unwrap();
    let acces = Some(Status::NFS3ERR_ACCES);
    let made = client
        .create(other, &directory, "b", mode(0o600))
        .await
        .unwrap_err();
    assert_eq!(made.status(), acces);
    let removed = client.remove(other, &directory, "a").await.unwrap_err();
    assert_eq!(removed.status(), acces);
    let arguments = nfs3::READDIR3args {
        dir: wire_handle(&directory),
        cookie: 0,
        cookieverf: nfs3::cookieverf3::default(),
        count: 4096,
    };
    let listed = call(&client, other, NFS_PROGRAM::NFSPROC3_READDIR, &arguments)
        .await
        .0;
    assert_eq!(listed, Status::NFS3ERR_ACCES);
    client.setattr(me, &directory, mode(0o700)).await.unwrap();
    assert_eq!(
        client
            .lookup(other, &directory, "a")
            .await
            .unwrap_err()
            .status(),
        acces
    );
}
