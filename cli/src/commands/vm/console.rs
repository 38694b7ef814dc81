//! `clusterctl vm console`: a machine's serial console on this terminal.

use std::io::{Read, Write};
use std::process::ExitCode;

use proto::admin::VmConsoleInput;

use crate::Context;
use crate::client::CliError;

/// Typed characters that wait for the console at most.
const CONSOLE_QUEUE: usize = 256;
/// Ctrl-] leaves the console, as in telnet and virsh.
const CONSOLE_ESCAPE: u8 = 0x1d;

/// `vm console`.
///
/// # Errors
/// What the node refused.
pub(super) async fn run(c: &Context, name: String) -> Result<ExitCode, CliError> {
    let mut connection = c.connect().await?;
    let (typed, queue) = tokio::sync::mpsc::channel(CONSOLE_QUEUE);
    let opening = VmConsoleInput {
        name: name.clone(),
        data: Vec::new(),
    };
    typed.send(opening).await.map_err(CliError::local)?;
    let mut printed = connection
        .api
        .vm_console(tokio_stream::wrappers::ReceiverStream::new(queue))
        .await?
        .into_inner();
    eprintln!("console of {name}; Ctrl-] leaves");
    let raw = RawTerminal::enter();
    // A blocking read of the terminal cannot be cancelled, so it has a thread of its own that ends
    // with the process.
    let (left, mut leaving) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut buffer = [0u8; 256];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut buffer) {
            let typed_bytes = &buffer[..count];
            let end = typed_bytes.iter().position(|&byte| byte == CONSOLE_ESCAPE);
            let data = typed_bytes[..end.unwrap_or(count)].to_vec();
            if typed
                .blocking_send(VmConsoleInput {
                    name: String::new(),
                    data,
                })
                .is_err()
                || end.is_some()
            {
                break;
            }
        }
        let _ = left.send(());
    });
    let result = loop {
        tokio::select! {
            message = printed.message() => match message {
                Ok(Some(output)) => {
                    let mut out = std::io::stdout().lock();
                    out.write_all(&output.data)?;
                    out.flush()?;
                }
                Ok(None) => break Ok(()),
                Err(status) => break Err(CliError::from(status)),
            },
            _ = &mut leaving => break Ok(()),
        }
    };
    drop(raw);
    result.map(|()| ExitCode::SUCCESS)
}

/// The terminal without line editing and echo, until it is dropped.
struct RawTerminal {
    before: Option<nix::sys::termios::Termios>,
}

impl RawTerminal {
    fn enter() -> RawTerminal {
        use nix::sys::termios;
        let stdin = std::io::stdin();
        let before = termios::tcgetattr(&stdin).ok();
        if let Some(mut raw) = before.clone() {
            termios::cfmakeraw(&mut raw);
            let _ = termios::tcsetattr(&stdin, termios::SetArg::TCSANOW, &raw);
        }
        RawTerminal { before }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = nix::sys::termios::tcsetattr(
                std::io::stdin(),
                nix::sys::termios::SetArg::TCSANOW,
                before,
            );
        }
    }
}
