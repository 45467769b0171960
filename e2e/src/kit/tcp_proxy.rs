//! A line between an agent and a hub that can become slow, or silent without a word, as real ones do.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// How a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// It carries everything.
    Fine,
    /// Who has called gets one byte a second.
    Trickling,
    /// It carries nothing, and nobody is told: what is half-open stays so.
    Dead,
}

/// A proxy that accepts on a port of its own; it ends when it is dropped.
pub struct TcpProxy {
    address: SocketAddr,
    line: watch::Sender<Line>,
    _accepting: JoinSet<()>,
}

impl TcpProxy {
    /// Starts one that calls this address for each that calls it.
    ///
    /// # Errors
    /// When there is no free port.
    pub async fn start(to: String) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (line, state) = watch::channel(Line::Fine);
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut calls = JoinSet::new();
            while let Ok((caller, _)) = listener.accept().await {
                let (to, state) = (to.clone(), state.clone());
                calls.spawn(async move {
                    if let Ok(target) = TcpStream::connect(&to).await {
                        carry(caller, target, state).await;
                    }
                });
            }
        });
        Ok(Self { address, line, _accepting: accepting })
    }

    /// Where to call.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Makes the line another one, for calls that last, too.
    pub fn become_(&self, line: Line) {
        self.line.send_replace(line);
    }
}

async fn carry(caller: TcpStream, target: TcpStream, state: watch::Receiver<Line>) {
    let ((up_from, down_to), (down_from, up_to)) = (caller.into_split(), target.into_split());
    tokio::join!(pass(up_from, up_to, state.clone(), false), pass(down_from, down_to, state, true),);
}

async fn pass(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut state: watch::Receiver<Line>,
    is_to_caller: bool,
) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let line = *state.borrow_and_update();
        let room = match line {
            Line::Dead => 0,
            Line::Trickling if is_to_caller => 1,
            Line::Trickling | Line::Fine => buffer.len(),
        };
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            read = from.read(&mut buffer[..room]), if room > 0 => {
                let Ok(count @ 1..) = read else { break };
                if to.write_all(&buffer[..count]).await.is_err() {
                    break;
                }
                if room == 1 {
                    sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }
    let _ = to.shutdown().await;
}
